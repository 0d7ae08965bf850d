// marlin_qqq._introspection: the planner, the tile table and the build, for Python. No torch, no GPU.
// Documented for users in python/marlin_qqq/introspection.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "format/limits.h"
#include "plan/families.h"
#include "plan/plan.h"

namespace py = pybind11;

namespace marlin_qqq::introspection {
namespace {

struct BuildInfo {
  std::string version = MARLIN_QQQ_VERSION;
  std::string build_type = MARLIN_QQQ_BUILD_TYPE;
  std::string compiler =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  std::string cuda_compiler = MARLIN_QQQ_CUDA_COMPILER;            // "": a CPU package
  std::string cuda_architectures = MARLIN_QQQ_CUDA_ARCHITECTURES;  // "80,86,90a,..."; "": a CPU package
  std::string torch_stable_abi = "2.10";                           // the oldest torch that the libraries run on
  std::string cpu_instruction_set = cpu::instruction_set_name(cpu::instruction_set());
};

std::string to_string(const BuildInfo& info) {
  std::ostringstream text;
  text << "marlin_qqq " << info.version << " (" << info.build_type << ", " << info.compiler << ", "
       << (info.cuda_compiler.empty() ? "CPU only" : info.cuda_compiler + " for " + info.cuda_architectures)
       << ", torch >= " << info.torch_stable_abi << ", CPU kernels: " << info.cpu_instruction_set << ")";
  return text.str();
}

std::string to_string(const plan::TileDescription& tile) {
  std::ostringstream text;
  text << tile.name << " (" << plan::family_name(tile.family) << "): " << tile.tile_tokens << " tokens x "
       << tile.tile_features << " features, " << tile.stages << " stages, " << tile.threads << " threads";
  return text.str();
}

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("plan: " + message); }

plan::Problem checked_problem(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                              bool quantizes, bool constant_weights, bool standalone) {
  if (num_tokens < 0) refuse("num_tokens must be 0 or more, got " + std::to_string(num_tokens));
  if (out_features <= 0 || out_features % format::kOutFeaturesMultiple != 0) {
    refuse("out_features must be a positive multiple of 64, got " + std::to_string(out_features));
  }
  if (in_features <= 0 || in_features % format::kInFeaturesMultiple != 0 || in_features >= format::kInFeaturesLimit) {
    refuse("in_features must be a positive multiple of 128 below " + std::to_string(format::kInFeaturesLimit) +
           ", got " + std::to_string(in_features));
  }
  if (group_size != format::kGroupSize && group_size != -1) {
    refuse("group_size must be 128 or -1 (per-channel), got " + std::to_string(group_size));
  }
  return {num_tokens, out_features, in_features, group_size, quantizes, constant_weights, standalone};
}

// As tune_planner.py measures it: launches that stand alone as parts of whole layers.
plan::Problem swept_problem(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                            bool constant_weights, bool standalone) {
  return checked_problem(num_tokens, out_features, in_features, group_size, /*quantizes=*/standalone, constant_weights,
                         standalone);
}

plan::Family family_of(const std::string& name) {
  if (name.empty()) return plan::Family::kNone;
  for (const plan::Family family : {plan::Family::kSm80, plan::Family::kSm90}) {
    if (name == plan::family_name(family)) return family;
  }
  refuse("family must be \"sm80\" or \"sm90\", got \"" + name + "\"");
}

plan::Plan make_plan(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                     const std::string& device, const std::string& tile, int split, const std::string& family,
                     bool quantizes, bool constant_weights, bool standalone) {
  return plan::make_plan(
      checked_problem(num_tokens, out_features, in_features, group_size, quantizes, constant_weights, standalone),
      plan::reference_device(device), tile, split, family_of(family));
}

std::vector<plan::Plan> candidates(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                                   const std::string& device, const std::string& family, bool quantizes,
                                   bool constant_weights, bool standalone) {
  return plan::candidates(
      checked_problem(num_tokens, out_features, in_features, group_size, quantizes, constant_weights, standalone),
      plan::reference_device(device), family_of(family));
}

std::map<std::string, double> sm90_model(bool standalone) {
  std::map<std::string, double> values;
  for (const plan::Sm90Constant& constant : plan::kSm90Constants) {
    values[constant.name] = plan::sm90_model(standalone).*constant.value;
  }
  return values;
}

// The default model with some constants replaced.
plan::Sm90Model sm90_model_with(const std::map<std::string, double>& values) {
  plan::Sm90Model model;
  size_t used = 0;
  for (const plan::Sm90Constant& constant : plan::kSm90Constants) {
    const auto entry = values.find(constant.name);
    if (entry == values.end()) continue;
    model.*constant.value = entry->second;
    ++used;
  }
  if (used != values.size()) refuse("a constant that sm90_model() does not have");
  return model;
}

std::vector<plan::Plan> sm90_candidates(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                                        const plan::DeviceProperties& device,
                                        const std::map<std::string, double>& model, bool constant_weights,
                                        bool standalone) {
  std::vector<plan::Plan> plans = plan::sm90_candidates(
      swept_problem(num_tokens, out_features, in_features, group_size, constant_weights, standalone), device,
      sm90_model_with(model));
  std::stable_sort(plans.begin(), plans.end(),
                   [](const plan::Plan& a, const plan::Plan& b) { return a.estimated_us < b.estimated_us; });
  return plans;
}

// Candidates of many problems, whose times one call estimates: what a fit does thousands of times.
class Sm90Estimator {
 public:
  // Adds candidates of a problem by their names. Returns their texts; "": no such candidate, not added.
  std::vector<std::string> add(int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size,
                               const plan::DeviceProperties& device, const std::vector<std::string>& names,
                               bool constant_weights, bool standalone) {
    const plan::Problem problem =
        swept_problem(num_tokens, out_features, in_features, group_size, constant_weights, standalone);
    std::map<std::string, plan::Plan> plans;
    for (const plan::Plan& plan : plan::sm90_candidates(problem, device)) plans[plan::candidate_name(plan)] = plan;
    std::vector<std::string> texts;
    for (const std::string& name : names) {
      const auto entry = plans.find(name);
      texts.push_back(entry == plans.end() ? "" : plan::to_string(entry->second));
      if (entry != plans.end()) points_.push_back({problem, device, entry->second});
    }
    return texts;
  }

  // Microseconds of every candidate added, in that order.
  std::vector<double> estimate(const std::map<std::string, double>& values) const {
    const plan::Sm90Model model = sm90_model_with(values);
    std::vector<double> times;
    times.reserve(points_.size());
    for (const Point& point : points_) {
      times.push_back(plan::sm90_estimated_us(point.problem, point.device, point.plan, model));
    }
    return times;
  }

 private:
  struct Point {
    plan::Problem problem;
    plan::DeviceProperties device;
    plan::Plan plan;
  };

  std::vector<Point> points_;
};

}  // namespace

PYBIND11_MODULE(_introspection, module) {
  module.doc() = "Planner, tile table and build information of marlin_qqq.";

  py::class_<plan::Plan>(module, "Plan", "A launch, fully decided.")
      .def_property_readonly("family", [](const plan::Plan& plan) { return plan::family_name(plan.family); })
      .def_property_readonly("name", &plan::candidate_name, "as MARLIN_QQQ_TILE and plan(tile=...) take it")
      .def_readonly("tile", &plan::Plan::tile, "index into the family's tile table")
      .def_readonly("tile_name", &plan::Plan::tile_name)
      .def_readonly("tile_tokens", &plan::Plan::tile_tokens)
      .def_readonly("tile_features", &plan::Plan::tile_features)
      .def_readonly("stages", &plan::Plan::stages, "of the shared-memory pipeline that are used")
      .def_readonly("split", &plan::Plan::split, "blocks that share one output tile (sm90: of one cluster)")
      .def_readonly("scratch_split", &plan::Plan::scratch_split, "clusters that share one output tile (sm90)")
      .def_readonly("whole_rounds", &plan::Plan::whole_rounds,
                    "tiles that each block takes whole before the blocks of a cluster share one (sm90)")
      .def_readonly("quantizes", &plan::Plan::quantizes, "whether the kernel quantises the activations itself (sm90)")
      .def_readonly("multicast", &plan::Plan::multicast, "blocks of a cluster that share one activation tile")
      .def_readonly("grid", &plan::Plan::grid, "blocks")
      .def_readonly("threads", &plan::Plan::threads, "threads a block")
      .def_readonly("shared_memory_bytes", &plan::Plan::shared_memory_bytes)
      .def_readonly("scratch_bytes", &plan::Plan::scratch_bytes)
      .def_readonly("estimated_us", &plan::Plan::estimated_us, "the cost model's time, for comparing candidates")
      .def("__repr__", [](const plan::Plan& plan) { return plan::to_string(plan); });

  py::class_<plan::TileDescription>(module, "TileDescription", "A row of the tile table.")
      .def_property_readonly("family", [](const plan::TileDescription& tile) { return plan::family_name(tile.family); })
      .def_readonly("name", &plan::TileDescription::name)
      .def_readonly("tile_tokens", &plan::TileDescription::tile_tokens)
      .def_readonly("tile_features", &plan::TileDescription::tile_features)
      .def_readonly("stages", &plan::TileDescription::stages)
      .def_readonly("threads", &plan::TileDescription::threads)
      .def("__repr__", [](const plan::TileDescription& tile) { return to_string(tile); });

  py::class_<BuildInfo>(module, "BuildInfo", "How the package was built.")
      .def_readonly("version", &BuildInfo::version)
      .def_readonly("build_type", &BuildInfo::build_type)
      .def_readonly("compiler", &BuildInfo::compiler)
      .def_readonly("cuda_compiler", &BuildInfo::cuda_compiler)
      .def_readonly("cuda_architectures", &BuildInfo::cuda_architectures)
      .def_readonly("torch_stable_abi", &BuildInfo::torch_stable_abi)
      .def_readonly("cpu_instruction_set", &BuildInfo::cpu_instruction_set)
      .def("__repr__", [](const BuildInfo& info) { return to_string(info); });

  py::class_<plan::DeviceProperties>(module, "DeviceProperties", "What the planner knows of a GPU.")
      .def(py::init([](int compute_capability, int num_sms, int64_t l2_bytes, int shared_memory_per_block,
                       double memory_gb_per_s, double clock_ghz, const std::array<int, 8>& clusters) {
             return plan::DeviceProperties{compute_capability, num_sms,   l2_bytes, shared_memory_per_block,
                                           memory_gb_per_s,    clock_ghz, clusters};
           }),
           py::kw_only(), py::arg("compute_capability"), py::arg("num_sms"), py::arg("l2_bytes"),
           py::arg("shared_memory_per_block"), py::arg("memory_gb_per_s"), py::arg("clock_ghz"), py::arg("clusters"))
      .def("__repr__", [](const plan::DeviceProperties& device) { return plan::to_string(device); });

  py::class_<Sm90Estimator>(module, "Sm90Estimator", "Candidates of many problems, whose times one call estimates.")
      .def(py::init<>())
      .def("add", &Sm90Estimator::add, py::arg("num_tokens"), py::arg("out_features"), py::arg("in_features"),
           py::arg("group_size"), py::arg("device"), py::arg("names"), py::arg("constant_weights") = true,
           py::arg("standalone") = false)
      .def("estimate", &Sm90Estimator::estimate, py::arg("model"));

  module.def("plan", &make_plan, py::arg("num_tokens"), py::arg("out_features"), py::arg("in_features"),
             py::arg("group_size") = 128, py::arg("device") = "sm_90", py::arg("tile") = "", py::arg("split") = 0,
             py::arg("family") = "", py::arg("quantizes") = false, py::arg("constant_weights") = false,
             py::arg("standalone") = false);
  module.def("candidates", &candidates, py::arg("num_tokens"), py::arg("out_features"), py::arg("in_features"),
             py::arg("group_size") = 128, py::arg("device") = "sm_90", py::arg("family") = "",
             py::arg("quantizes") = false, py::arg("constant_weights") = false, py::arg("standalone") = false);
  module.def("tile_table", &plan::tile_table);
  module.def("reference_device", &plan::reference_device, py::arg("architecture"));
  module.def("sm90_model", &sm90_model, py::arg("standalone") = false,
             "the Hopper cost model's constants (csrc/plan/sm90_model.h), or those of launches that stand alone");
  module.def(
      "sm90_is_power_limited",
      [](int64_t num_tokens, int64_t out_features, int64_t in_features) {
        return plan::sm90_is_power_limited(swept_problem(num_tokens, out_features, in_features, -1, false, false));
      },
      py::arg("num_tokens"), py::arg("out_features"), py::arg("in_features"),
      "whether the Hopper cost model counts a product as one at the power limit");
  module.def("sm90_candidates", &sm90_candidates, py::arg("num_tokens"), py::arg("out_features"),
             py::arg("in_features"), py::arg("group_size"), py::arg("device"), py::arg("model"),
             py::arg("constant_weights") = true, py::arg("standalone") = false,
             "candidates by a model whose constants are replaced by those in the dictionary, best first");
  module.def("build_info", [] { return BuildInfo{}; });
}

}  // namespace marlin_qqq::introspection
