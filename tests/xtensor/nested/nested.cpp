// The front end on xtensor's nested header layout (0.26 and later): every header it needs there, and every kind of
// container once.
#include "lowrank/xtensor.hpp"

#include <doctest/doctest.h>

#if !defined(LOWRANK_TEST_NESTED_xadapt) || !defined(LOWRANK_TEST_NESTED_xarray) ||  \
    !defined(LOWRANK_TEST_NESTED_xfixed) || !defined(LOWRANK_TEST_NESTED_xtensor) || \
    !defined(LOWRANK_TEST_NESTED_xstrided_view) || !defined(LOWRANK_TEST_NESTED_xview)
#error "the front end did not take the nested headers"
#endif

TEST_CASE("containers, adaptors and views of the nested layout are seen in place") {
  xt::xtensor<float, 3> batch = xt::xtensor<float, 3>::from_shape({2, 3, 4});
  xt::xarray<float> any = xt::xarray<float>::from_shape({5, 4});
  xt::xtensor_fixed<double, xt::xshape<2, 3>> fixed;
  std::vector<float> memory(12, 1.0F);
  auto adapted = xt::adapt(memory, std::vector<std::size_t>{3, 4});
  auto slice = xt::view(batch, 1, xt::all(), xt::range(1, 3));
  auto strided = xt::strided_view(any, {xt::range(1, 4), xt::all()});
  CHECK(lowrank::view_of(batch).data() == batch.data());
  CHECK(lowrank::view_of(batch).rows() == 6);
  CHECK(lowrank::view_of(any).data() == any.data());
  CHECK(lowrank::view_of(fixed).data() == fixed.data());
  CHECK(lowrank::view_of(adapted).data() == memory.data());
  CHECK(lowrank::view_of(slice).data() == &batch(1, 0, 1));
  CHECK(lowrank::view_of(slice).row_stride() == 4);
  CHECK(lowrank::view_of(strided).data() == &any(1, 0));
  lowrank::Matrix<float> m(2, 2);
  m(1, 0) = 3;
  CHECK(lowrank::as_xtensor(m)(1, 0) == 3);
  CHECK(lowrank::as_xtensor(m.view().transposed())(0, 1) == 3);
}
