// SPDX-License-Identifier: Apache-2.0
// Any linear operator behind one type, so that a program holds one iteration a scalar, not one for every operator.
#pragma once

#include "lowrank/linalg/linear_operator.hpp"

namespace lowrank::detail {

/// Refers to an operator over T, which must outlive it. What the operator cannot do is asked of the object:
/// `has_gram()`, `knows_energy()`.
///
/// **Cost** an indirect call a product with a block of vectors.
template <Real T>
class AnyOperator {
 public:
  using scalar = T;

  template <class Op>
  requires(LinearOperator<Op, T> && !std::same_as<Op, AnyOperator>) AnyOperator(const Op& A)  // NOLINT: on purpose
      : A_(&A), table_(&table_of<Op>), rows_(A.rows()), cols_(A.cols()) {}

  [[nodiscard]] Index rows() const noexcept { return rows_; }
  [[nodiscard]] Index cols() const noexcept { return cols_; }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const { table_->apply(A_, X, Y); }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const { table_->apply_adjoint(A_, X, Y); }

  [[nodiscard]] bool has_gram() const noexcept { return table_->apply_gram != nullptr; }
  [[nodiscard]] GramSide gram_side() const { return table_->gram_side(A_); }
  void apply_gram(MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) const { table_->apply_gram(A_, X, Y, Z); }

  [[nodiscard]] bool knows_energy() const noexcept { return table_->energy != nullptr; }
  [[nodiscard]] double frobenius_norm_squared() const { return table_->energy(A_); }

 private:
  struct Table {
    void (*apply)(const void*, MatrixView<const T>, MatrixView<T>);
    void (*apply_adjoint)(const void*, MatrixView<const T>, MatrixView<T>);
    void (*apply_gram)(const void*, MatrixView<const T>, MatrixView<T>, MatrixView<T>) = nullptr;
    GramSide (*gram_side)(const void*) = nullptr;
    double (*energy)(const void*) = nullptr;
  };
  template <class Op>
  static constexpr Table make_table() {
    Table t{
        [](const void* A, MatrixView<const T> X, MatrixView<T> Y) { static_cast<const Op*>(A)->apply(X, Y); },
        [](const void* A, MatrixView<const T> X, MatrixView<T> Y) { static_cast<const Op*>(A)->apply_adjoint(X, Y); }};
    if constexpr (HasGram<Op, T>) {
      t.apply_gram = [](const void* A, MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) {
        static_cast<const Op*>(A)->apply_gram(X, Y, Z);
      };
      t.gram_side = [](const void* A) { return static_cast<const Op*>(A)->gram_side(); };
    }
    if constexpr (HasFrobeniusNorm<Op>)
      t.energy = [](const void* A) { return double(static_cast<const Op*>(A)->frobenius_norm_squared()); };
    return t;
  }
  template <class Op>
  static constexpr Table table_of = make_table<Op>();

  const void* A_;
  const Table* table_;
  Index rows_, cols_;
};

}  // namespace lowrank::detail
