// A tile is the piece of a problem that fits into the first-level cache. Kernels see every operand of a tile as a Lane
// of compute-type numbers, whatever its dtype, layout and broadcasting: tensors that already lie so are used in place,
// all others are staged through a buffer. Layouts therefore cost no template instantiation and no copy of a tensor.
#pragma once

#include <algorithm>
#include <optional>

#include "../problem.h"
#include "vec_math.h"

namespace elbo_ext {
namespace {

// Elements in a tile: as many as fit a buffer; fewer where several operands go through buffers, so that those and the
// memory they stand for fit into the first-level cache together (benchmarks/NOTES.md).
constexpr int64_t kTile = 1024, kStagedTile = 256;

// Rows [row, row + rows) and columns [col, col + cols) of a space; more than one row only with all their columns.
struct Tile {
  int64_t row, rows, col, cols;
  int64_t size() const { return rows * cols; }
};

template <class R>
struct Lane {
  const R* data;
  int64_t step;  // 1, or 0: `data` points to a register's width of one repeated number
};

template <class R>
struct alignas(64) Buffer {
  R data[kTile];
};

template <class R>
constexpr DType dtype_of() { return std::is_same_v<R, double> ? DType::kDouble : DType::kFloat; }

// The position of a row, as an offset into a view.
inline int64_t row_offset(const Space& space, const View& view, int64_t row) {
  int64_t offset = 0;
  for (int i = space.row_dims - 1; i >= 0; --i) {
    const int64_t outer = i == 0 ? 0 : row / space.row_size[i];
    offset += (row - outer * space.row_size[i]) * view.row_stride[i];
    row = outer;
  }
  return offset;
}

// The offset of the one element of a view that a whole tile stands for, if it is only one.
inline std::optional<int64_t> repeated(const Space& space, const View& view, const Tile& tile) {
  const int last = space.col_dims - 1;
  if (view.cols_uniform) {
    if (tile.rows > 1 && !view.rows_uniform) return std::nullopt;
    return row_offset(space, view, tile.row);
  }
  if (tile.rows > 1 || view.col_stride[last] != 0) return std::nullopt;  // before the divisions, which take longer
  int64_t rest = tile.col / space.col_size[last];
  if (tile.col + tile.cols > (rest + 1) * space.col_size[last]) return std::nullopt;
  int64_t offset = row_offset(space, view, tile.row);
  for (int i = last - 1; i >= 0; --i) {
    const int64_t outer = i == 0 ? 0 : rest / space.col_size[i];
    offset += (rest - outer * space.col_size[i]) * view.col_stride[i];
    rest = outer;
  }
  return offset;
}

// How many rows of a tile, from `row` on, lie one after the other in a view of dense columns.
inline int64_t adjoining_rows(const View& view, const Tile& tile, int64_t row) {
  const int64_t rows = tile.row + tile.rows - row;
  if (rows == 1 || view.dense_rows == 1) return 1;  // before the division, which takes longer
  return std::min(rows, view.dense_rows - row % view.dense_rows);
}

// Whether a tile is one stretch of memory.
inline bool adjoins(const View& view, const Tile& tile) {
  return view.cols_dense && adjoining_rows(view, tile, tile.row) == tile.rows;
}

// Calls run(offset, stride, count, position) for each stretch of a tile that a view steps through evenly; `position` is
// the place of its first element in the tile.
template <class Run>
inline void for_each_run(const Space& space, const View& view, const Tile& tile, Run&& run) {
  for (int64_t r = 0, rows = 1; r < tile.rows; r += rows) {
    int64_t position = r * tile.cols;
    const int64_t base = view.rows_uniform ? 0 : row_offset(space, view, tile.row + r);
    if (view.cols_dense) {
      rows = adjoining_rows(view, tile, tile.row + r);
      run(base + tile.col, 1, rows * tile.cols, position);
      continue;
    }
    if (view.cols_uniform) {
      run(base, 0, tile.cols, position);
      continue;
    }
    const int last = space.col_dims - 1;
    int64_t index[kMaxDims], rest = tile.col, offset = base;
    for (int i = last; i >= 0; --i) {
      const int64_t outer = i == 0 ? 0 : rest / space.col_size[i];
      index[i] = rest - outer * space.col_size[i];
      offset += index[i] * view.col_stride[i];
      rest = outer;
    }
    for (const int64_t end = position + tile.cols; position < end;) {
      const int64_t count = std::min(space.col_size[last] - index[last], end - position);
      run(offset, view.col_stride[last], count, position);
      position += count;
      offset += count * view.col_stride[last];
      index[last] += count;
      for (int i = last; i > 0 && index[i] == space.col_size[i]; --i) {
        offset += view.col_stride[i - 1] - index[i] * view.col_stride[i];
        index[i] = 0;
        ++index[i - 1];
      }
    }
  }
}

// ---- conversion between a tensor's dtype and the compute type ----

template <class Call>
inline void with_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kFloat: return call(float{});
    case DType::kDouble: return call(double{});
    case DType::kBFloat16: return call(c10::BFloat16{});
    case DType::kHalf: return call(c10::Half{});
    default: return call(bool{});
  }
}
// The same for what is read, data too.
template <class Call>
inline void with_readable_dtype(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kUInt8: return call(uint8_t{});
    case DType::kInt8: return call(int8_t{});
    case DType::kInt16: return call(int16_t{});
    case DType::kInt32: return call(int32_t{});
    case DType::kInt64: return call(int64_t{});
    default: return with_dtype(dtype, call);
  }
}

template <class S, class R>
inline void load_dense(const S* from, int64_t count, R* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, R>) {
    std::memcpy(to, from, count * sizeof(R));
    return;
  } else if constexpr (std::is_same_v<R, float> && (std::is_same_v<S, c10::BFloat16> || std::is_same_v<S, c10::Half>)) {
    for (; i + Vec<S>::size() <= count; i += Vec<S>::size()) {
      const auto [low, high] = at::vec::convert_to_float(Vec<S>::loadu(from + i));
      low.store(to + i);
      high.store(to + i + Vec<float>::size());
    }
  }
  for (; i < count; ++i) to[i] = static_cast<R>(from[i]);
}

template <class S, class R>
inline void store_dense(const R* from, int64_t count, S* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, R>) {
    std::memcpy(to, from, count * sizeof(R));
    return;
  } else if constexpr (std::is_same_v<R, float> && (std::is_same_v<S, c10::BFloat16> || std::is_same_v<S, c10::Half>)) {
    for (; i + Vec<S>::size() <= count; i += Vec<S>::size())
      at::vec::convert_from_float<S>(Vec<float>::loadu(from + i), Vec<float>::loadu(from + i + Vec<float>::size()))
          .store(to + i);
  }
  for (; i < count; ++i) to[i] = static_cast<S>(from[i]);
}

// ---- reading ----

template <class R>
inline Lane<R> splat(R number, Buffer<R>& buffer) {
  Vec<R>(number).store(buffer.data);
  return {buffer.data, 0};
}

template <class R>
inline Lane<R> load(const Space& space, const Operand& operand, const Tile& tile, Buffer<R>& buffer) {
  if (!operand.present()) return splat(static_cast<R>(operand.constant), buffer);
  if (operand.dtype == dtype_of<R>() && adjoins(operand, tile))
    return {static_cast<const R*>(operand.data) + row_offset(space, operand, tile.row) + tile.col, 1};
  Lane<R> lane{buffer.data, 1};
  with_readable_dtype(operand.dtype, [&](auto zero) {
    using S = decltype(zero);
    const S* data = static_cast<const S*>(operand.data);
    if (const auto place = repeated(space, operand, tile)) {
      lane = splat(static_cast<R>(data[*place]), buffer);
      return;
    }
    for_each_run(space, operand, tile, [&](int64_t offset, int64_t stride, int64_t count, int64_t position) {
      R* to = buffer.data + position;
      if (stride == 1) load_dense(data + offset, count, to);
      else if (stride == 0) std::fill_n(to, count, static_cast<R>(data[offset]));
      else
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<R>(data[offset + i * stride]);
    });
  });
  return lane;
}

// ---- writing ----

// The sum of `count` numbers in double, four partial sums at a time, always in the same order.
template <class R>
inline double sum_row(const R* numbers, int64_t count) {
  double sum[4] = {0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int j = 0; j < 4; ++j) sum[j] += numbers[i + j];
  for (; i < count; ++i) sum[0] += numbers[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Where a kernel should put the numbers of a tile of `view`: in place if they can stay there, else in the buffer, from
// which finish_store takes them.
template <class R>
inline R* begin_store(const Space& space, const View& view, const Tile& tile, Buffer<R>& buffer) {
  const bool in_place = view.dtype == dtype_of<R>() && adjoins(view, tile);
  return in_place ? static_cast<R*>(view.data) + row_offset(space, view, tile.row) + tile.col : buffer.data;
}

template <class R>
inline void finish_store(const Space& space, const View& view, const Tile& tile, const R* numbers, Buffer<R>& buffer) {
  if (numbers != buffer.data) return;
  with_dtype(view.dtype, [&](auto zero) {
    using S = decltype(zero);
    S* data = static_cast<S*>(view.data);
    for_each_run(space, view, tile, [&](int64_t offset, int64_t stride, int64_t count, int64_t position) {
      if (stride == 1) store_dense(numbers + position, count, data + offset);
      else
        for (int64_t i = 0; i < count; ++i) data[offset + i * stride] = static_cast<S>(numbers[position + i]);
    });
  });
}

// The gradient of one operand over one tile: where a kernel puts its numbers, or that it should only add them up.
template <class R>
struct GradientTile {
  R* numbers = nullptr;   // null: not wanted element by element
  bool add_up = false;    // one number for the whole tile, for the element at `place`
  int64_t place = 0;
  double sum = 0;
  Buffer<R> buffer;

  void begin(const Space& space, const GradientSink& sink, const Tile& tile) {
    numbers = nullptr;
    add_up = false;
    sum = 0;
    if (!sink.wanted()) return;
    if (!sink.summed) numbers = begin_store(space, sink, tile, buffer);
    else if (const auto one = repeated(space, sink, tile)) {
      add_up = true;
      place = *one;
    } else {
      numbers = buffer.data;
    }
  }

  void finish(const Space& space, const GradientSink& sink, const Tile& tile, int64_t group) {
    if (!sink.wanted()) return;
    if (!sink.summed) return finish_store(space, sink, tile, numbers, buffer);
    double* partial = sink.partial + group * sink.partial_stride;
    if (add_up) {
      partial[place] += sum;
      return;
    }
    for_each_run(space, sink, tile, [&](int64_t offset, int64_t stride, int64_t count, int64_t position) {
      if (stride == 0) partial[offset] += sum_row(numbers + position, count);
      else
        for (int64_t i = 0; i < count; ++i) partial[offset + i * stride] += numbers[position + i];
    });
  }
};

// ---- walking ----

// Rows shorter than this share a tile with their neighbours; longer ones get tiles of their own (benchmarks/NOTES.md).
constexpr int64_t kShortRow = 128;

// How blocks are cut into tiles: of `elements` elements at most, and none across a multiple of `cols` columns.
struct TileLimits {
  int64_t elements = kTile, cols = std::numeric_limits<int64_t>::max();

  // Makes tiles as small as a view of a kernel's asks for. Where it repeats one element along the innermost dimension, as a
  // scale of one number per example does, tiles end where that does, so that it is one number to each of them.
  template <class R>
  void consider(const Space& space, const View& view) {
    if (view.data == nullptr || view.cols_uniform) return;
    const int64_t run = space.col_dims > 1 ? space.col_size[space.col_dims - 1] : 0;
    if (run >= kStagedTile && view.col_stride[space.col_dims - 1] == 0) cols = run;
    else if (!view.cols_dense || view.dtype != dtype_of<R>()) elements = kStagedTile;
  }
};

// Calls visit(tile) for the tiles of one block, in order.
template <class Visit>
inline void for_each_tile(const Space& space, const Blocks& blocks, int64_t block, TileLimits limits, Visit&& visit) {
  const auto visit_row = [&](int64_t row, int64_t begin, int64_t end) {
    for (int64_t col = begin, size; col < end; col += size) {
      size = std::min({limits.elements, end - col, limits.cols - col % limits.cols});
      visit(Tile{row, 1, col, size});
    }
  };
  if (blocks.blocks_per_row > 1) {
    const int64_t row = block / blocks.blocks_per_row;
    const int64_t begin = (block - row * blocks.blocks_per_row) * kBlockElements;
    const int64_t end = std::min(begin + kBlockElements, space.cols);
    visit_row(row, begin, end);
    return;
  }
  const int64_t first = block * blocks.rows_per_block;
  const int64_t last = std::min(first + blocks.rows_per_block, space.rows);
  if (space.cols < kShortRow) {
    const int64_t at_once = limits.elements / space.cols;
    for (int64_t row = first; row < last; row += at_once)
      visit(Tile{row, std::min(at_once, last - row), 0, space.cols});
    return;
  }
  for (int64_t row = first; row < last; ++row) visit_row(row, 0, space.cols);
}

}  // namespace
}  // namespace elbo_ext
