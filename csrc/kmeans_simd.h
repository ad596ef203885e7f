// The inner loops of kmeans.cpp for one instruction set; every_isa.h includes them once for each.
namespace HUBERT_ECG_ISA {

// Adds n points to the sums and counts of their clusters.
template <class T>
HUBERT_ECG_TARGET static void add(const T* x, const int64_t* labels, int64_t n, int64_t dim, int64_t num_k,
                                  double* sums, int64_t* counts) {
  for (int64_t i = 0; i < n; ++i, x += dim) {
    const int64_t k = labels[i];
    if (k < 0 || k >= num_k) continue;
    double* __restrict sum = sums + k * dim;
    for (int64_t d = 0; d < dim; ++d) sum[d] += double(x[d]);
    ++counts[k];
  }
}

const Kernels kernels = {add<float>, add<double>};

}  // namespace HUBERT_ECG_ISA
