// generate PACKAGE "a question": an answer of a package that gemexport wrote, with the settings that lie beside it.

import Foundation
import Tokenizers

let chunk = 256  // tokens of a prompt at once, which bounds what masks and scores take

func run(_ arguments: [String]) async throws {
    guard arguments.count == 3 else { throw Failure("give the path of an .mlpackage and a question") }
    let package = URL(fileURLWithPath: arguments[1])
    let folder = package.deletingLastPathComponent()  // tokenizer.json, chat_template.jinja, generation_config.json
    let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
    let settings = try Settings(file: folder.appendingPathComponent("generation_config.json"))
    let model = try await Model(package: package)
    let prompt = try tokenizer.applyChatTemplate(messages: [["role": "user", "content": arguments[2]]])
    guard !prompt.isEmpty else { throw Failure("the prompt has no tokens") }
    var logits: [Float] = []
    for start in stride(from: 0, to: prompt.count, by: chunk) {
        logits = try await model.logits(after: Array(prompt[start..<min(start + chunk, prompt.count)]))
    }
    var answer: [Int] = []
    while true {
        let next = settings.choose(logits)
        if settings.ends.contains(next) { break }
        answer.append(next)
        if model.room == 0 { break }
        logits = try await model.logits(after: [next])
    }
    print(tokenizer.decode(tokens: answer))
}

do {
    try await run(CommandLine.arguments)
} catch {
    FileHandle.standardError.write(Data("generate: \(error.localizedDescription)\n".utf8))
    exit(2)
}
