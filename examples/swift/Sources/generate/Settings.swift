// generation_config.json as transformers reads it: how the next token is chosen, and which tokens end an answer.

import Foundation

struct Settings: Decodable {
    var doSample = false
    var temperature: Float = 1
    var topK = 0
    var topP: Float = 1
    var ends: Set<Int> = []

    private enum Key: String, CodingKey {
        case doSample = "do_sample", temperature, topK = "top_k", topP = "top_p", ends = "eos_token_id"
    }

    init(from decoder: Decoder) throws {
        let values = try decoder.container(keyedBy: Key.self)
        doSample = try values.decodeIfPresent(Bool.self, forKey: .doSample) ?? false
        temperature = try values.decodeIfPresent(Float.self, forKey: .temperature) ?? 1
        topK = try values.decodeIfPresent(Int.self, forKey: .topK) ?? 50  // transformers' own, where it samples
        topP = try values.decodeIfPresent(Float.self, forKey: .topP) ?? 1
        if let one = try? values.decode(Int.self, forKey: .ends) {
            ends = [one]
        } else {
            ends = Set(try values.decodeIfPresent([Int].self, forKey: .ends) ?? [])
        }
    }

    init(file: URL) throws {
        self = try JSONDecoder().decode(Settings.self, from: Data(contentsOf: file))
    }

    /// The next token: the likeliest, or one drawn among the `topK` likeliest that have `topP` of the probability.
    func choose(_ logits: [Float]) -> Int {
        let order = logits.indices.sorted { logits[$0] > logits[$1] }
        guard doSample, temperature > 0 else { return order[0] }
        let kept = topK > 0 ? Array(order.prefix(topK)) : order
        let weights = kept.map { exp((logits[$0] - logits[order[0]]) / temperature) }
        let total = weights.reduce(0, +)
        var sum: Float = 0
        var last = 0
        for (place, weight) in weights.enumerated() {
            sum += weight
            last = place
            if sum >= topP * total { break }
        }
        var drawn = Float.random(in: 0..<sum)
        for place in 0...last {
            drawn -= weights[place]
            if drawn < 0 { return kept[place] }
        }
        return kept[last]
    }
}
