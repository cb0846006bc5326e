// Does on the fake runtime what its arguments say, one after another, and prints the runtime's
// calls, results ("= ...") and exceptions ("! ..."). Whatever an earlier command has left in the
// caches of launch.cu is there for the later ones.
//
//   fail:CALL=ERROR   the next such call fails; several times for several
//   capturing         this thread captures a graph from now on
//   NAME=VALUE        of the device or the runtime: device, sms, shared, launches_clusters,
//                     ptx_version, clusters, runtime_version, driver_version
//   row_kernel:NAME   which kernel takes whole rows: auto, portable, ...
//   limits            device_limits
//   launch:A, launch:B   one of two kernels
//   count:A           clusters of four blocks
//   loss:ROWS,COLUMNS    the loss with its gradient, of bfloat16: whatever kernels that takes;
//   score, backward, multiply   likewise log-probs, their backward, and the gradient's factors
//   query             query_devices
#include <cuda_runtime.h>

#include <cstdlib>
#include <iostream>

#include "cuda/device_query.h"
#include "cuda/run.cuh"

namespace cfpo::cuda {
namespace {

void kernel_a(int) {}
void kernel_b(int) {}

int device = 0;
RowKernel wanted = RowKernel::kAuto;

void launch_one(const std::string& which) {
  Grid grid;
  grid.blocks = 7;
  grid.blocks_y = 3;
  grid.threads = 128;
  grid.shared_bytes = 1024;
  const Execution execution{device, 5, nullptr};
  launch(which == "A" ? "kernel_a" : "kernel_b", which == "A" ? kernel_a : kernel_b, grid,
         execution, 1);
}

void count_clusters() {
  Grid grid;
  grid.cluster = 4;
  grid.threads = 512;
  grid.shared_bytes = 200000;
  const auto count = clusters_at_once("kernel_a", kernel_a, grid, Execution{device, 5, nullptr});
  std::cout << "= " << count << "\n";
}

void run(const std::string& what, const std::string& shape) {
  // Never read: nothing runs.
  static char memory[16];
  Rows rows{};
  rows.data = memory;
  rows.dtype = DType::kBFloat16;
  rows.n_rows = std::atoll(shape.c_str());
  rows.n_cols = std::atoll(shape.c_str() + shape.find(',') + 1);
  const Execution execution{device, 5, memory, wanted};
  if (what == "loss") {
    PolicyLossParams params{};
    params.problem.logits = params.dlogits = rows;
    run_stage<bfloat16>(PolicyStage{params}, rows, execution);
  } else if (what == "score") {
    TokenLogpsParams params{};
    params.problem.logits = rows;
    run_stage<bfloat16>(LogpsStage{params}, Rows(), execution);
  } else if (what == "backward") {
    TokenLogpsBackwardParams params{};
    params.problem.logits = params.dlogits = rows;
    run_stage<bfloat16>(LogpsBackwardStage{params}, rows, execution);
  } else {
    static float factor = 2.0f;
    run_multiply<bfloat16>(rows, &factor, 0, execution);
  }
}

void query() {
  const DeviceQuery query = query_devices();
  std::cout << "= " << query.status << " " << query.status_name << ": " << query.status_text << "\n"
            << "= " << query.devices.size() << " devices\n";
}

void fail(const std::string& what) {
  const std::size_t equals = what.find('=');
  for (const auto& [error, name] : fake::errors()) {
    if (what.substr(equals + 1) == name) {
      fake::runtime().script[what.substr(0, equals)].push_back(error);
      return;
    }
  }
  throw std::logic_error("an unknown error: " + what);
}

void set(const std::string& name, int value) {
  fake::Runtime& r = fake::runtime();
  const std::map<std::string, int*> variables{
      {"device", &device},
      {"sms", &r.attributes[cudaDevAttrMultiProcessorCount]},
      {"launches_clusters", &r.attributes[cudaDevAttrClusterLaunch]},
      {"ptx_version", &r.ptx_version},
      {"clusters", &r.clusters},
      {"runtime_version", &r.runtime_version},
      {"driver_version", &r.driver_version}};
  *variables.at(name) = value;
}

void obey(const std::string& command) {
  const std::string name = command.substr(0, command.find_first_of(":="));
  const std::string rest =
      name.size() < command.size() ? command.substr(name.size() + 1) : std::string();
  if (name == "fail") {
    fail(rest);
  } else if (name == "capturing") {
    fake::runtime().capturing = true;
  } else if (name == "limits") {
    const DeviceLimits limits = device_limits(device);
    std::cout << "= " << limits.sm_count << " " << limits.shared_per_block << " "
              << limits.shared_per_sm << " " << limits.clusters << "\n";
  } else if (name == "launch") {
    launch_one(rest);
  } else if (name == "count") {
    count_clusters();
  } else if (name == "loss" || name == "score" || name == "backward" || name == "multiply") {
    run(name, rest);
  } else if (name == "row_kernel") {
    wanted = row_kernel(rest);
  } else if (name == "query") {
    query();
  } else {
    set(name, std::atoi(rest.c_str()));
  }
}

}  // namespace
}  // namespace cfpo::cuda

int main(int n, char** arguments) {
  for (int i = 1; i < n; ++i) {
    try {
      cfpo::cuda::obey(arguments[i]);
    } catch (const std::invalid_argument& error) {
      std::cout << "! ValueError: " << error.what() << "\n";
    } catch (const std::runtime_error& error) {
      std::cout << "! RuntimeError: " << error.what() << "\n";
    }
    std::cout.flush();
  }
  const fake::Runtime& r = fake::runtime();
  std::cout << "left: " << cudaGetErrorName(r.last_error) << ", capture mode " << r.mode << "\n";
}
