// SPDX-License-Identifier: Apache-2.0
// Hugging Face on disk: a Llama-architecture checkpoint in, the same or a PEFT adapter out.
#pragma once

#include <memory>
#include <string>

#include "methods.hpp"

namespace llama {

/// The files a base came from, kept open: what is made of it is written as the same kind of checkpoint.
struct Source;

struct Base {
  ModelConfig config;
  Weights<float> weights;
  std::shared_ptr<const Source> source;
};

/// Reads config.json and model.safetensors (or its shards) of a directory; bf16 and f16 are widened to float.
/// Throws lowrank::IoError naming the file and the key: anything missing or of the wrong shape, biases.
Base load_checkpoint(const std::string& directory);

struct SaveOptions {
  std::shared_ptr<const Source> source = nullptr;  ///< of the base; none for one that was trained here
  std::string dtype = "auto";  ///< f32, bf16, f16, or auto: each tensor as the source has it, else f32
};

/// Writes a checkpoint, each file whole or not at all, config.json last.
///
/// With a source it is the source with other weights: the same shards, names and types, config.json with every key it
/// had, and the model's other files (tokenizer, generation config, licence) beside it. A head that no longer equals the
/// table it was tied to is written, and the configuration unties it. Throws lowrank::IoError; lowrank::ArgumentError
/// for an unknown dtype.
void save_checkpoint(const std::string& directory, const ModelConfig& config, const Weights<float>& weights,
                     const SaveOptions& options = {});

/// Writes adapter_config.json and adapter_model.safetensors as PEFT reads them, for the base the adaptation started
/// from: the adapter of a residual base is turned into one of that base, of twice the rank. Modules trained in full
/// beside the adapters go along as modules_to_save. Throws lowrank::IoError; lowrank::ArgumentError for full
/// fine-tuning (save a checkpoint instead) and for quantised bases, whose adapters fit nothing else.
void save_adapter(const std::string& directory, const Adaptation& adaptation, Model<float>& model,
                  const std::string& base_name);

/// Throws lowrank::ArgumentError naming the option if what is written to `path` would change the base: `path` is the
/// base's directory or lies in it, by whatever name, or holds symbolic links to the base's files.
void check_apart(const std::string& option, const std::string& path, const std::string& base);

}  // namespace llama
