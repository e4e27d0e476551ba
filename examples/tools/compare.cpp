// SPDX-License-Identifier: Apache-2.0
// lowrank compare: how the leading subspaces of two checkpoints, two adapters or two updates lie to each other.
#include <lowrank/linalg/factor_svd.hpp>
#include <lowrank/spectrum/alignment.hpp>
#include <lowrank/spectrum/subspace.hpp>

#include <cstdio>
#include <limits>
#include <optional>

#include "spectrum_leading.hpp"
#include "spectrum_scan.hpp"

namespace lowrank::tool::compare_command {
namespace {

struct Options {
  ScanOptions scan;
  std::string a, b, base, filter;
  Index k = 8;
};

/// `difference`: ‖A − B‖_F / ‖A‖_F. `error`: the largest residual of the triplets, relative to their σ₁.
template <class T>
Json entry(const std::string& name, Svd<T> a, Svd<T> b, double difference, double error, Index k) {
  const Index m = a.U.rows(), n = a.V.rows();
  a = trimmed(std::move(a), k);
  b = trimmed(std::move(b), k);
  Json j = {{"name", name}, {"rows", m}, {"cols", n}, {"relative_difference", finite(difference)}, {"error", error}};
  if (a.S.empty() || b.S.empty()) {
    j["note"] = "one of the two is zero";
    return j;
  }
  const auto side = [&](const Matrix<T>& U, const Matrix<T>& V) {
    const auto phi = subspace_similarity<T>(U.view(), V.view());
    const auto angles = principal_angles<T>(U.view(), V.view());
    Json grid = Json::array();
    for (Index i = 0; i < phi.rows(); ++i) {
      Json row = Json::array();
      for (Index l = 0; l < phi.cols(); ++l) row.push_back(phi(i, l));
      grid.push_back(std::move(row));
    }
    return Json{{"phi", phi(phi.rows() - 1, phi.cols() - 1)},
                {"noise_phi", double(std::max(U.cols(), V.cols())) / double(U.rows())},
                {"grassmann", grassmann_distance(angles)},
                {"chordal", chordal_distance(angles)},
                {"angles", angles},
                {"grid", std::move(grid)}};
  };
  j["left"] = side(a.U, b.U);
  j["right"] = side(a.V, b.V);
  return j;
}

Json adapters_entry(const io::AdapterModule& a, const io::AdapterModule& b, Index k) {
  LoraFactors<float> minus = b.factors;
  minus.scale = -minus.scale;
  const LoraFactors<float> terms[] = {a.factors, minus};
  const double norm = frobenius_norm(a.factors);
  const double difference = frobenius_norm(std::span<const LoraFactors<float>>(terms)) / norm;
  return entry(a.name, svd(a.factors), svd(b.factors), difference, double(std::numeric_limits<float>::epsilon()), k);
}

template <class T>
Json checkpoints_entry(const MatrixPair& pair, const MatrixTensor* base, Index k) {
  Matrix<T> A = values_of<T>(*pair.first), B = values_of<T>(*pair.second), W;
  if (base != nullptr) W = values_of<T>(*base);
  // Straight from the values as they are stored, before either difference to the base is rounded.
  double norm = 0, difference = 0;
  for (Index i = 0; i < A.size(); ++i) {
    const double a = double(A.data()[i]), b = double(B.data()[i]), w = base != nullptr ? double(W.data()[i]) : 0;
    norm += (a - w) * (a - w);
    difference += (a - b) * (a - b);
    if (base != nullptr) {
      A.data()[i] = T(a - w);
      B.data()[i] = T(b - w);
    }
  }
  auto a = leading<T>(A.view(), k), b = leading<T>(B.view(), k);
  double error = 0;
  for (const auto* t : {&a, &b})
    for (const double r : t->residuals)
      if (t->S[0] > 0) error = std::max(error, r / double(t->S[0]));
  const bool converged = a.converged && b.converged;
  Json j = entry<T>(pair.first->name, std::move(static_cast<Svd<T>&>(a)), std::move(static_cast<Svd<T>&>(b)),
                    std::sqrt(difference / norm), error, k);
  j["converged"] = converged;
  say_storage(j, {{"a_scale", pair.first}, {"b_scale", pair.second}, {"base_scale", base}});
  return j;
}

// ---- plan -----------------------------------------------------------------------------------------------------------

/// The inputs, and what is to be done with them. Jobs refer to it: it stays where it is.
struct Plan : ScanPlan {
  std::optional<io::PeftAdapter> adapter_a, adapter_b;
  std::optional<io::Checkpoint> a, b, base;
  std::vector<MatrixTensor> list_a, list_b, list_base;
};

void plan_adapters(const Options& o, Plan& p) {
  if (!o.base.empty()) throw UsageError("compare: adapters are updates already, --base is for checkpoints");
  p.adapter_a.emplace(io::read_peft(o.a));
  p.adapter_b.emplace(io::read_peft(o.b));
  note_dora(o.scan.common, o.a, *p.adapter_a);
  note_dora(o.scan.common, o.b, *p.adapter_b);
  p.names = names_of(p.adapter_a->modules);
  for (const auto& [x, y] : pairs_of(*p.adapter_a, *p.adapter_b, "B", o.filter, p.skipped))
    p.jobs.push_back({x->name, 1, double(x->factors.A.size() + x->factors.B.size()),
                      [x = x, y = y, &o] { return adapters_entry(*x, *y, o.k); }});
}

void plan_checkpoints(const Options& o, Plan& p) {
  p.a.emplace(checkpoint_path(o.a));
  p.b.emplace(checkpoint_path(o.b));
  std::vector<Skipped> same_again;  // what several hold is skipped once
  p.list_a = matrices_of(*p.a, p.skipped);
  p.list_b = matrices_of(*p.b, same_again);
  if (!o.base.empty()) {
    p.base.emplace(checkpoint_path(o.base));
    p.list_base = matrices_of(*p.base, same_again);
  }
  p.names = names_of(p.list_a);
  for (const MatrixPair& pair : pairs_of(p.list_a, p.list_b, "B", o.filter, p.skipped)) {
    const MatrixTensor* w = p.base ? partner_of(*pair.first, p.list_base, "the base", p.skipped) : nullptr;
    if (p.base && w == nullptr) continue;
    p.jobs.push_back(
        {pair.first->name, pair.bytes(), double(pair.first->rows) * double(pair.first->cols), [pair, w, &o] {
           return with_precision(pair.is_double() || (w != nullptr && w->is_double()),
                                 [&]<class T>(T) { return checkpoints_entry<T>(pair, w, o.k); });
         }});
  }
}

void make_plan(const Options& o, Plan& p) {
  if (is_adapter(o.a) != is_adapter(o.b)) throw UsageError("compare: give two adapters or two checkpoints");
  if (is_adapter(o.a))
    plan_adapters(o, p);
  else
    plan_checkpoints(o, p);
  p.fingerprint = fingerprint({o.a, o.b, o.base}, text("compare k ", o.k));
  expect_something(o.a, o.filter, p);
  note_quantised(o.scan.common, {&p.list_a, &p.list_b, &p.list_base});
}

// ---- report ---------------------------------------------------------------------------------------------------------

std::string table_text(const ScanResult& result) {
  std::string table = "difference  φ left  noise  φ right  noise  matrix\n";
  char line[96];
  for (const Json& j : result.matrices) {
    const auto cell = [&](int width, const char* format, const Json& x) {
      if (x.is_number())
        std::snprintf(line, sizeof line, format, width, x.get<double>());
      else  // of an update that is zero
        std::snprintf(line, sizeof line, "%*s", width, "-");
      table += line;
    };
    const auto at = [&](const char* side, const char* key) { return j.contains(side) ? j[side][key] : Json(nullptr); };
    cell(10, "%*.4g", j["relative_difference"]);
    cell(8, "%*.4f", at("left", "phi"));
    cell(7, "%*.4f", at("left", "noise_phi"));
    cell(9, "%*.4f", at("right", "phi"));
    cell(7, "%*.4f", at("right", "noise_phi"));
    table += "  " + j["name"].get<std::string>() + "\n";
  }
  return table;
}

void run(const Options& o) {
  o.scan.check({o.a, o.b, o.base});
  Plan plan;
  make_plan(o, plan);
  ScanResult result = run_scan(o.scan, "compare", plan);
  const std::string table = table_text(result);
  finish_scan(o.scan, std::move(result),
              {{"command", "compare"},
               {"a", o.a},
               {"b", o.b},
               {"base", o.base.empty() ? Json(nullptr) : Json(o.base)},
               {"k", o.k}},
              table);
}

void add_compare(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("compare", "Leading subspaces of two checkpoints, updates or adapters: similarity and angles");
  sub->add_option("a", o->a, "A checkpoint or a PEFT adapter directory")->required();
  sub->add_option("b", o->b, "Another of the same kind")->required();
  sub->add_option("--base", o->base, "Compare A - BASE with B - BASE");
  sub->add_option("-k,--k", o->k, "Dimension of the subspaces")->capture_default_str()->check(count());
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  o->scan.add_to(sub);
  sub->callback([o, sub] {
    o->scan.expect_all_used(sub);
    run(*o);
  });
}

const Registration registration{62, "compare", add_compare};

}  // namespace
}  // namespace lowrank::tool::compare_command
