// The ops' names and types. Kernels register themselves in cpu_ops.cpp and, in the CUDA library, cuda_ops.cpp;
// shapes for tracing (fakes) are in python/marlin_qqq/_fakes.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(marlin_qqq, library) {
  library.def(
      "marlin_qqq_gemm(Tensor a, Tensor b_q_weight, Tensor s_tok, Tensor s_ch, Tensor s_group, Tensor(a!) workspace, "
      "SymInt size_m, SymInt size_n, SymInt size_k, *, Tensor? bias=None, ScalarType? out_dtype=None, "
      "bool constant_weights=False) -> Tensor");
  library.def("quantize_per_token(Tensor x) -> (Tensor, Tensor)");
  library.def(
      "marlin_qqq_linear(Tensor x, Tensor b_q_weight, Tensor s_ch, Tensor s_group, *, Tensor? bias=None, "
      "ScalarType? out_dtype=None, bool constant_weights=False) -> Tensor");
  library.def("pack_weight(Tensor codes, int group_size) -> Tensor");
  library.def("unpack_weight(Tensor packed, int group_size) -> Tensor");
  library.def("permute_group_scale(Tensor scale) -> Tensor");
  library.def("unpermute_group_scale(Tensor scale) -> Tensor");
  library.def("permute_channel_scale(Tensor scale) -> Tensor");
  library.def("unpermute_channel_scale(Tensor scale) -> Tensor");
}
