// The table of contents of the native module: one line per op and device.
#include <pybind11/pybind11.h>

#include "kmeans.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<hubert_ecg::Tensor> {
  PYBIND11_TYPE_CASTER(hubert_ecg::Tensor, const_name("DLPackCapsule"));
  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    value = hubert_ecg::Tensor(static_cast<const hubert_ecg::DLTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor")));
    return true;
  }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def("kmeans_assign_cpu", &hubert_ecg::kmeans_assign_cpu, nogil);
#ifdef HUBERT_ECG_CUDA
  m.def("kmeans_assign_cuda", &hubert_ecg::kmeans_assign_cuda, nogil);
#endif
}
