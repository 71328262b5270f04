// The rows of a whole model as an argument of one launch. It needs no copy to the device and no memory that a captured
// graph would have to keep alive.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.cuh"

namespace pyfeedback::cuda {

// Elements that one block processes.
constexpr int64_t kBlockElements = 4096;

inline int64_t blocks_of(int64_t numel) {
  return (numel + kBlockElements - 1) / kBlockElements;
}

// The number of blocks of a row: none if the blocks of the row before it process its elements as well.
inline int64_t blocks_of(const FeedbackRow& row) {
  return row.with_previous ? 0 : blocks_of(row.numel);
}
inline int64_t blocks_of(const AlignmentPair& pair) {
  return blocks_of(pair.numel);
}

// The arguments of a launch may take 32764 bytes on sm_70 and later since CUDA 12.1. A larger model takes more
// launches, and a small one a smaller table, which is faster to copy.
constexpr int kSmallTable = 4096, kLargeTable = 32764;
constexpr int kOtherArguments = 128;  // bytes beside the table

template <typename Row, int kBytes>
struct Table {
  static constexpr int kCapacity = (kBytes - kOtherArguments) / static_cast<int>(sizeof(Row) + sizeof(int32_t));
  Row row[kCapacity];
  int32_t first_block[kCapacity + 1];  // [count] is the number of blocks
  int32_t count;

  // The row that a block processes: the last one with first_block <= block.
  __device__ __forceinline__ int find(unsigned block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= static_cast<int>(block) ? low : high) = middle;
    }
    return low;
  }

  int64_t blocks() const { return first_block[count]; }
};

// visit(table) for as few tables as can hold all rows. Rows that share blocks are in the same table. No row is empty.
template <int kBytes, typename Row, typename Visitor>
cudaError_t visit_tables(const std::vector<Row>& rows, const Visitor& visit) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  Table<Row, kBytes> table;
  for (size_t next = 0; next < rows.size();) {
    table.count = table.first_block[0] = 0;
    while (next < rows.size()) {
      const int64_t end = table.blocks() + blocks_of(rows[next]);
      size_t last = next + 1;
      while (last < rows.size() && blocks_of(rows[last]) == 0) ++last;
      if (end > kMaxBlocks || table.count + (last - next) > table.kCapacity) break;
      for (; next < last; ++next) {
        table.row[table.count++] = rows[next];
        table.first_block[table.count] = static_cast<int32_t>(end);
      }
    }
    if (table.count == 0) return cudaErrorInvalidValue;  // one tensor of more than 2^43 elements
    if (const cudaError_t error = visit(table)) return error;
  }
  return cudaSuccess;
}

template <typename Row, typename Visitor>
cudaError_t for_each_table(const std::vector<Row>& rows, const Visitor& visit) {
  const bool small = rows.size() <= static_cast<size_t>(Table<Row, kSmallTable>::kCapacity);
  return small ? visit_tables<kSmallTable>(rows, visit) : visit_tables<kLargeTable>(rows, visit);
}

// A row whose operands have different strides.
template <typename Row>
struct Strided : Row {
  RowLayout<Row> strides;
};

// for_each_table over the rows without a layout, then over those with one.
template <typename Row, typename Visitor>
cudaError_t for_each_table(const std::vector<Row>& rows, const std::vector<RowLayout<Row>>& layouts,
                           const Visitor& visit) {
  std::vector<Row> dense;
  std::vector<Strided<Row>> strided;
  for (const Row& row : rows) {
    if (row.layout < 0) {
      dense.push_back(row);
    } else {
      strided.push_back({row, layouts[row.layout]});
    }
  }
  if (const cudaError_t error = for_each_table(dense, visit)) return error;
  return for_each_table(strided, visit);
}

// The offset of element `element`, in row-major order, in each operand.
template <int kOperands>
__device__ __forceinline__ void find_offsets(const Layout<kOperands>& strides, int64_t element,
                                             int64_t (&offset)[kOperands]) {
#pragma unroll
  for (int k = 0; k < kOperands; ++k) offset[k] = 0;
  for (int64_t d = strides.dims - 1; d >= 0; --d) {
    const int64_t index = element % strides.size[d];
    element /= strides.size[d];
#pragma unroll
    for (int k = 0; k < kOperands; ++k) offset[k] += index * strides.stride[k][d];
  }
}

// visit(i) for every element of this thread in block `block` of a row. Adjacent threads have adjacent elements.
template <typename Visitor>
__device__ __forceinline__ void for_each_element(int64_t numel, int64_t block, const Visitor& visit) {
  const int64_t end = min(numel, (block + 1) * kBlockElements);
  for (int64_t i = block * kBlockElements + threadIdx.x; i < end; i += kThreads) visit(i);
}

// visit(first, count) for every pack of `kWidth` elements of this thread in block `block` of a row. The last pack may
// have fewer elements.
template <int kWidth, typename Visitor>
__device__ __forceinline__ void for_each_pack(int64_t numel, int64_t block, const Visitor& visit) {
  const int64_t end = min(numel, (block + 1) * kBlockElements);
  for (int64_t i = block * kBlockElements + int64_t{threadIdx.x} * kWidth; i < end; i += kThreads * kWidth) {
    visit(i, static_cast<int>(min(end - i, int64_t{kWidth})));
  }
}

}  // namespace pyfeedback::cuda
