// SPDX-License-Identifier: Apache-2.0
// The frame of docs/getting-started.md.

TEST_CASE("getting-started.md: a first layer") {
  //@ block
  layer.forward(X, Y, ws);
  CHECK((Y - target).squaredNorm() < 1e-3F * (X * W.transpose() - target).squaredNorm());
}
