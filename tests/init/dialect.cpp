// SPDX-License-Identifier: Apache-2.0
// One dialect: the scalar of the factors is the first template argument of every initialiser, the storage of the base
// the second, and the default rank is one number.
#include <doctest/doctest.h>

#include "lowrank/init/corda.hpp"
#include "lowrank/init/eva.hpp"
#include "lowrank/init/gaussian.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/loftq.hpp"
#include "lowrank/init/lora_ga.hpp"
#include "lowrank/init/lora_xs.hpp"
#include "lowrank/init/milora.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/orthogonal.hpp"
#include "lowrank/init/pissa.hpp"
#include "lowrank/init/qpissa.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

template <class A, class B>
constexpr bool same = std::is_same_v<A, B>;

template <class W, class F>
constexpr bool pissa_takes = requires(const Matrix<W>& w) {
  pissa<F>(w);
};
template <class W, class F, class B>
constexpr bool pissa_stores = requires(const Matrix<W>& w) {
  pissa<F, B>(w);
};
template <class W, class F>
constexpr bool loftq_takes = requires(const Matrix<W>& w) {
  loftq<F>(w);
};

using F32 = const Matrix<float>&;
using B16 = const Matrix<bf16>&;
using F64 = const Matrix<double>&;
using std::declval;

// Left out, T is what W is computed in and the base is stored in it.
static_assert(same<decltype(pissa(declval<F32>())), Initialised<float>>);
static_assert(same<decltype(pissa(declval<B16>())), Initialised<float>>);
static_assert(same<decltype(pissa(declval<F64>())), Initialised<double>>);
// Spelt out it is the same call.
static_assert(same<decltype(pissa<float>(declval<B16>())), Initialised<float>>);
static_assert(same<decltype(pissa<double>(declval<F64>())), Initialised<double>>);
// The base's storage is the second argument, as in Initialised.
static_assert(same<decltype(pissa<float, bf16>(declval<F32>())), Initialised<float, bf16>>);
static_assert(same<decltype(pissa_from_svd<float, f16>(declval<F32>(), Svd<float>())), Initialised<float, f16>>);
static_assert(same<decltype(milora<float, bf16>(declval<F32>())), Initialised<float, bf16>>);
static_assert(same<decltype(olora<float, bf16>(declval<B16>())), Initialised<float, bf16>>);
static_assert(
    same<decltype(corda<float, bf16>(declval<F32>(), ActivationCovariance<float>(1))), Initialised<float, bf16>>);
static_assert(same<decltype(lora_ga<float, bf16>(declval<F32>(), declval<F32>())), Initialised<float, bf16>>);
static_assert(same<decltype(mica<double>(declval<F64>())), Initialised<double>>);
static_assert(same<decltype(lora_xs<float>(declval<B16>())), LoraXs<float>>);
static_assert(same<decltype(loftq<float>(declval<B16>())), QuantisedInit<float>>);
static_assert(same<decltype(qpissa<double>(declval<F64>())), QuantisedInit<double>>);
static_assert(same<decltype(kaiming<float>(1, 1)), Initialised<float>>);

// A storage type is no scalar, a wider or narrower scalar is not computed in, and doubles are not stored in two bytes.
static_assert(!pissa_takes<float, bf16> && !pissa_takes<bf16, bf16> && !pissa_takes<float, double>);
static_assert(!pissa_takes<double, float> && pissa_takes<bf16, float>);
static_assert(pissa_stores<float, float, f16> && !pissa_stores<float, float, double>);
static_assert(!pissa_stores<double, double, bf16> && pissa_stores<double, double, double>);
static_assert(!loftq_takes<float, bf16> && loftq_takes<f16, float>);

}  // namespace

TEST_CASE("every initialiser has rank 16 and alpha 16 unless told otherwise") {
  const auto check = [](const auto& options) {
    CHECK(options.rank == 16);
    CHECK(options.alpha == 16);
    CHECK_FALSE(options.rank_stabilised);
  };
  check(KaimingOptions());
  check(GaussianOptions());
  check(OrthogonalOptions());
  check(PissaOptions());
  check(MiloraOptions());
  check(MicaOptions());
  check(OloraOptions());
  check(CordaOptions());
  check(EvaOptions());
  check(LoraGaOptions());
  check(LoraXsOptions());
  check(LoftqOptions());
  CHECK(ActivationSvdOptions().components == 16);  // what EvaOptions asks for
  const Matrix<float> W = test::random_matrix<float>(40, 36, 1);
  const auto init = pissa<float, bf16>(W);
  CHECK(init.factors.rank() == 16);
  CHECK(init.factors.scale == 1.0F);
}
