#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "tensor.h"

namespace hubert_ecg {

// Files of samples, mapped for reading. A file stays open no longer than it takes to map it: a large store has more
// shards than a process may have open files.
class Shards {
 public:
  // sizes: samples of each file; half: they are float16, else int16.
  Shards(const std::vector<std::string>& paths, const std::vector<int64_t>& sizes, bool half);
  ~Shards() { unmap(); }
  Shards(const Shards&) = delete;
  Shards& operator=(const Shards&) = delete;

  // out[b, l, t] = scale[b, l] sample[l length + start + t] of the record that lies at `offset` of its shard, with the
  // length, start and so on of b; 0 from the record's end on. Fails, and has read nothing, where a record does not lie
  // within its shard, or a start not within its record.
  //   shard, offset, length, start [B] int64; scale [B, L] float32; out [B, L, T] float32
  void gather(Tensor shard, Tensor offset, Tensor length, Tensor start, Tensor scale, Tensor out, int num_threads);

 private:
  struct Map {
    void* data;
    int64_t size;  // in samples
  };
  void unmap();
  void forget_after(int64_t bytes);

  std::vector<Map> maps_;
  bool half_;
  int64_t num_bytes_ = 0;
  std::atomic<int64_t> touched_{0};
};

}  // namespace hubert_ecg
