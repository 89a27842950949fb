// The package in Core ML: compiled, with its state, and fed as docs/coreml.md says.

import CoreML
import Foundation

/// What the package's description says of itself.
struct Description {
    let masks: [String: Int?]  // input -> sliding window, nil for full attention
    let context: Int  // tokens that the state holds
}

final class Model {
    private let model: MLModel
    private let state: MLState
    private let description: Description
    private var past = 0  // tokens that the state holds

    /// Compile and load the package at `url`; CPU and GPU, since blocks of integers are reported to give wrong numbers
    /// on the Neural Engine.
    init(package url: URL) async throws {
        let configuration = MLModelConfiguration()
        configuration.computeUnits = .cpuAndGPU
        model = try MLModel(contentsOf: try await MLModel.compileModel(at: url), configuration: configuration)
        state = model.makeState()
        description = try Model.describe(model)
    }

    private static func describe(_ model: MLModel) throws -> Description {
        let own = model.modelDescription.metadata[.creatorDefinedKey] as? [String: String] ?? [:]
        let window = own["co.huggingface.exporters.sliding_window"].flatMap { Int($0) }
        var masks: [String: Int?] = [:]
        for name in ["fullAttentionMask", "slidingAttentionMask"]
        where model.modelDescription.inputDescriptionsByName[name] != nil {
            masks[name] = .some(name == "slidingAttentionMask" ? window : nil)
        }
        // [layers, 1, kv_heads, context, head_dim]
        guard let shape = model.modelDescription.stateDescriptionsByName["keyCache"]?.stateConstraint?.bufferShape,
            shape.count == 5
        else { throw Failure("the package has no state that is called keyCache") }
        return Description(masks: masks, context: shape[3])
    }

    var room: Int { description.context - past }

    /// Logits of the token after `tokens`, which the state then holds too.
    func logits(after tokens: [Int]) async throws -> [Float] {
        guard tokens.count <= room else { throw Failure("the context of \(description.context) tokens is full") }
        let ids = MLShapedArray<Int32>(scalars: tokens.map { Int32($0) }, shape: [1, tokens.count])
        var inputs: [String: MLFeatureValue] = ["inputIds": MLFeatureValue(shapedArray: ids)]
        for (name, window) in description.masks {
            inputs[name] = MLFeatureValue(shapedArray: mask(count: tokens.count, window: window))
        }
        let given = try MLDictionaryFeatureProvider(dictionary: inputs)
        let made = try await model.prediction(from: given, using: state)
        past += tokens.count
        guard let array = made.featureValue(for: "logits")?.multiArrayValue else {
            throw Failure("the package gives no logits")
        }
        let vocabulary = array.shape[2].intValue
        return Array(MLShapedArray<Float>(converting: array).scalars.suffix(vocabulary))
    }

    /// `[1, 1, count, past + count]`: 0 where a query sees a key, causally and within its window, else -65504. Its last
    /// axis ends with the newest token, which is how the program knows where it is.
    private func mask(count: Int, window: Int?) -> MLShapedArray<Float16> {
        let end = past + count
        var scalars = [Float16](repeating: -65504, count: count * end)
        for query in 0..<count {
            let position = past + query
            let first = window.map { max(0, position - $0 + 1) } ?? 0
            for key in first...position { scalars[query * end + key] = 0 }
        }
        return MLShapedArray(scalars: scalars, shape: [1, 1, count, end])
    }
}

struct Failure: LocalizedError {
    let errorDescription: String?
    init(_ problem: String) { errorDescription = problem }
}
