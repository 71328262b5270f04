// Launches the kernel of a depthwise or grouped layer, then the one that adds up its chunks.
#include "../depthwise.h"
#include "depthwise_any.cuh"
#include "depthwise_chunks.cuh"
#include "depthwise_tiles.cuh"
#include "launch.cuh"
#include "scalar.cuh"

namespace pyfeedback::cuda {

namespace {

// visit(kernel, grid) for the first of these tiles that supports the layer, otherwise for the kernel of any layer.
template <typename Tile, typename... Others, typename Visitor>
auto visit_first(const DepthwiseLayer& layer, const Visitor& visit) {
  if (Tile::supports(layer)) return visit(depthwise_tile_kernel<Tile>, tile_grid<Tile>(layer));
  if constexpr (sizeof...(Others) > 0) {
    return visit_first<Others...>(layer, visit);
  } else {
    return visit_dtype(layer.dtype,
                       [&](auto scalar) { return visit(depthwise_kernel<decltype(scalar)>, sample_grid(layer)); });
  }
}

template <typename Visitor>
auto visit_kernel(const DepthwiseLayer& layer, const Visitor& visit) {
  return visit_first<DepthwiseTile<3, 1>, DepthwiseTile<3, 2>, DepthwiseTile<5, 1>, DepthwiseTile<5, 2>,
                     DepthwiseTile<7, 1>, DepthwiseTile<7, 2>>(layer, visit);
}

}  // namespace

int64_t depthwise_partial(const DepthwiseLayer& layer) {
  return visit_kernel(layer, [&](auto, const DepthwiseGrid& grid) { return grid.chunks * sums_of(layer); });
}

cudaError_t launch_depthwise(const DepthwiseLayer& layer, double* partial, cudaStream_t stream) {
  return visit_kernel(layer, [&](auto kernel, const DepthwiseGrid& grid) {
    const cudaError_t error =
        launch_threads(grid.threads, kernel, grid.group_blocks * grid.chunks, stream, layer, grid, partial);
    return error != cudaSuccess ? error : launch_finish(layer, grid.chunks, partial, stream);
  });
}

}  // namespace pyfeedback::cuda
