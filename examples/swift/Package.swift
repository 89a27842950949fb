// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "generate",
    platforms: [.macOS(.v15), .iOS(.v18)],
    dependencies: [.package(url: "https://github.com/huggingface/swift-transformers", from: "1.1.0")],
    targets: [
        .executableTarget(
            name: "generate",
            dependencies: [.product(name: "Tokenizers", package: "swift-transformers")]
        )
    ]
)
