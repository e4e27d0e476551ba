// SPDX-License-Identifier: Apache-2.0
// Hugging Face on disk: a Llama-architecture checkpoint in, the same or a PEFT adapter out.
#pragma once

#include <string>

#include "methods.hpp"

namespace llama {

struct Base {
  ModelConfig config;
  Weights<float> weights;
};

/// Reads config.json and model.safetensors (or its shards) of a directory; bf16 and f16 are widened to float.
/// Throws lowrank::IoError naming the file and the key: anything missing or of the wrong shape, biases, a rope scaling
/// this model does not have.
Base load_checkpoint(const std::string& directory);

/// Writes config.json and model.safetensors (f32), each whole or not at all. A head that no longer equals the table it
/// was tied to is written, and the configuration unties it. Throws lowrank::IoError.
void save_checkpoint(const std::string& directory, const ModelConfig& config, const Weights<float>& weights);

/// Writes adapter_config.json and adapter_model.safetensors as PEFT reads them, for the base the adaptation started
/// from: the adapter of a residual base is turned into one of that base, of twice the rank. Modules trained in full
/// beside the adapters go along as modules_to_save. Throws lowrank::IoError; lowrank::ArgumentError for full
/// fine-tuning (save a checkpoint instead) and for quantised bases, whose adapters fit nothing else.
void save_adapter(const std::string& directory, const Adaptation& adaptation, Model<float>& model,
                  const std::string& base_name);

}  // namespace llama
