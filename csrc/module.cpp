// The table of contents of the native module: one line per op and device.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "add_norm.h"
#include "attention.h"
#include "bias_gelu.h"
#include "conv_norm_gelu.h"
#include "deltas.h"
#include "gather.h"
#include "kmeans.h"
#include "label.h"
#include "linear.h"
#include "mfcc.h"
#include "published.h"
#include "time_freq.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<hubert_ecg::Tensor> {
  PYBIND11_TYPE_CASTER(hubert_ecg::Tensor, const_name("DLPackCapsule"));
  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    value =
        hubert_ecg::Tensor(static_cast<const hubert_ecg::DLTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor")));
    return true;
  }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // For the calling thread.
  m.def("set_num_threads", &omp_set_num_threads);
  m.def("mfcc_cpu", &hubert_ecg::mfcc_cpu, nogil);
  m.def("deltas_cpu", &hubert_ecg::deltas_cpu, nogil);
  m.def("time_freq_cpu", &hubert_ecg::time_freq_cpu, nogil);
  m.def("kmeans_assign_cpu", &hubert_ecg::kmeans_assign_cpu, nogil);
  m.def("kmeans_accumulate_cpu", &hubert_ecg::kmeans_accumulate_cpu, nogil);
  m.def("kmeans_step_cpu", &hubert_ecg::kmeans_step_cpu, nogil);
  m.def("frame_assign_cpu", &hubert_ecg::frame_assign_cpu, nogil);
  m.def("add_norm_cpu", &hubert_ecg::add_norm_cpu, nogil);
  m.def("add_norm_backward_cpu", &hubert_ecg::add_norm_backward_cpu, nogil);
  m.def("bias_gelu_cpu", &hubert_ecg::bias_gelu_cpu, nogil);
  m.def("bias_gelu_backward_cpu", &hubert_ecg::bias_gelu_backward_cpu, nogil);
  m.def("masked_span_attention_cpu", &hubert_ecg::masked_span_attention_cpu, nogil);
  m.def("masked_span_attention_backward_cpu", &hubert_ecg::masked_span_attention_backward_cpu, nogil);
  m.def("conv_norm_gelu_cpu", &hubert_ecg::conv_norm_gelu_cpu, nogil);
  m.def("conv_norm_gelu_backward_cpu", &hubert_ecg::conv_norm_gelu_backward_cpu, nogil);
#ifdef __x86_64__
  m.def("linear_cpu", &hubert_ecg::linear_cpu, nogil);
  m.def("linear_backward_cpu", &hubert_ecg::linear_backward_cpu, nogil);
#endif
  m.def("published_ring_cpu", &hubert_ecg::published_ring_cpu, nogil);
  m.def("published_scale_cpu", &hubert_ecg::published_scale_cpu, nogil);
  py::class_<hubert_ecg::Shards>(m, "Shards", py::module_local())
      .def(py::init<const std::vector<std::string>&, const std::vector<int64_t>&, bool>(), nogil)
      .def("gather", &hubert_ecg::Shards::gather, nogil);
#ifdef HUBERT_ECG_CUDA
  m.def("mfcc_cuda", &hubert_ecg::mfcc_cuda, nogil);
  m.def("deltas_cuda", &hubert_ecg::deltas_cuda, nogil);
  m.def("time_freq_cuda", &hubert_ecg::time_freq_cuda, nogil);
  m.def("kmeans_assign_cuda", &hubert_ecg::kmeans_assign_cuda, nogil);
  m.def("kmeans_accumulate_cuda", &hubert_ecg::kmeans_accumulate_cuda, nogil);
  m.def("kmeans_step_cuda", &hubert_ecg::kmeans_step_cuda, nogil);
  m.def("frame_assign_cuda", &hubert_ecg::frame_assign_cuda, nogil);
  m.def("masked_span_attention_cuda", &hubert_ecg::masked_span_attention_cuda, nogil);
  m.def("masked_span_attention_backward_cuda", &hubert_ecg::masked_span_attention_backward_cuda, nogil);
#endif
}
