#include "small_m.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <string>
#include <vector>

#include "vectors.h"

namespace fused_lora::cpu {
namespace {

using at::BFloat16;

// at least the elements of the widest chunk
constexpr int64_t kUnit = 32;
// multiplications for a thread: fewer take less time than to wake it
constexpr int64_t kGrain = 1 << 18;

// The lines of a matrix, its rows or its columns, whichever are contiguous.
template <typename T>
struct Lines {
  const T* data = nullptr;
  int64_t size = 0, length = 0, stride = 0;

  const T* operator[](int64_t line) const { return data + line * stride; }
};

// Rows in float32, each padded with zeros to a multiple of kUnit.
struct Rows {
  std::vector<float> values;
  int64_t size = 0, length = 0, stride = 0;

  explicit Rows(int64_t size = 0, int64_t length = 0)
      : size(size), length(length), stride((length + kUnit - 1) / kUnit * kUnit) {
    values.resize(size * stride);
  }

  const float* operator[](int64_t row) const { return values.data() + row * stride; }
};

// out (M, P) = a w + scale · h v + bias.  bias: may be null.
template <typename T>
struct Operands {
  T* out;
  int64_t M, P;
  float scale;
  Rows a, h;
  Lines<T> w, v;
  const T* bias;
};

// --------------------------------------------------------------------------------------------------
// Columns of w contiguous: elements of out are dot products
// --------------------------------------------------------------------------------------------------

constexpr int kColumns = 4;

// Sums products of kRows rows of a, from `row` on, with kColumns columns of w, from `column` on, lane by lane.
template <typename T, int L, int kRows>
FUSED_LORA_INLINE void add_dots(typename Lanes<L>::Float (&sums)[kRows][kColumns], const Rows& a, int64_t row,
                                const Lines<T>& w, int64_t column) {
  using C = Chunk<T, L>;
  const T* from[kColumns];
  for (int j = 0; j < kColumns; ++j) {
    // beyond the last column: the last once more, and its sum is not stored
    from[j] = w[std::min(column + j, w.size - 1)];
  }
  const auto add = [&](int64_t first, const T* const(&columns)[kColumns]) __attribute__((always_inline)) {
    typename Lanes<L>::Float ws[kColumns][C::vectors];
    for (int j = 0; j < kColumns; ++j) {
      C::read(columns[j], ws[j]);
    }
    for (int part = 0; part < C::vectors; ++part) {
      for (int i = 0; i < kRows; ++i) {
        const auto as = load<typename Lanes<L>::Float>(a[row + i] + first + part * L);
        for (int j = 0; j < kColumns; ++j) {
          sums[i][j] += as * ws[j][part];
        }
      }
    }
  };
  const int64_t whole = w.length / C::elements * C::elements;
  for (int64_t first = 0; first < whole; first += C::elements) {
    const T* columns[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      columns[j] = from[j] + first;
    }
    add(first, columns);
  }
  if (whole < w.length) {
    T rest[kColumns][C::elements] = {};
    const T* columns[kColumns];
    for (int j = 0; j < kColumns; ++j) {
      std::copy(from[j] + whole, from[j] + w.length, rest[j]);
      columns[j] = rest[j];
    }
    add(whole, columns);
  }
}

template <typename T, int L, int kRows>
FUSED_LORA_INLINE void dot_rows(const Operands<T>& of, int64_t row, int64_t column) {
  typename Lanes<L>::Float sums[kRows][kColumns] = {};
  add_dots<T, L, kRows>(sums, of.a, row, of.w, column);
  // sums of their own: every addition to a large number is rounded as that number is
  typename Lanes<L>::Float lora[kRows][kColumns] = {};
  add_dots<T, L, kRows>(lora, of.h, row, of.v, column);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < std::min<int64_t>(kColumns, of.P - column); ++j) {
      const float bias = of.bias == nullptr ? 0.0f : static_cast<float>(of.bias[column + j]);
      of.out[(row + i) * of.P + column + j] = static_cast<T>(sum<L>(sums[i][j]) + of.scale * sum<L>(lora[i][j]) + bias);
    }
  }
}

// Columns from begin * kColumns on.
template <typename T, int L>
FUSED_LORA_INLINE void dots(const Operands<T>& of, int64_t begin, int64_t end) {
  // as many sums as registers hold
  constexpr int kRows = L == 16 ? 4 : 2;
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t row = 0;
    for (; row + kRows <= of.M; row += kRows) {
      dot_rows<T, L, kRows>(of, row, unit * kColumns);
    }
    for (; row < of.M; ++row) {
      dot_rows<T, L, 1>(of, row, unit * kColumns);
    }
  }
}

// --------------------------------------------------------------------------------------------------
// Rows of w contiguous: rows of out are sums of them
// --------------------------------------------------------------------------------------------------

// columns whose sums stay in a core's cache
constexpr int64_t kBlock = 512;

// Adds products of scale · a with kLines rows of w, from `line` on, to the sums of columns first…first + count.
// sums: M rows of kBlock, in a chunk's order.
template <typename T, int L, int kLines>
FUSED_LORA_INLINE void add_lines(float* sums, int64_t M, float scale, const Rows& a, const Lines<T>& w, int64_t line,
                                 int64_t first, int64_t count) {
  using C = Chunk<T, L>;
  using Float = typename Lanes<L>::Float;
  for (int64_t chunk = 0; chunk < count; chunk += C::elements) {
    Float ws[kLines][C::vectors];
    for (int j = 0; j < kLines; ++j) {
      const T* from = w[line + j] + first + chunk;
      T rest[C::elements] = {};
      if (count - chunk < C::elements) {
        std::copy(from, from + (count - chunk), rest);
        from = rest;
      }
      C::read(from, ws[j]);
    }
    for (int64_t i = 0; i < M; ++i) {
      const float* factors = a[i] + line;
      for (int part = 0; part < C::vectors; ++part) {
        // short sums first: a long one in float32 would be less exact than a library's
        Float group = factors[0] * ws[0][part];
        for (int j = 1; j < kLines; ++j) {
          group += factors[j] * ws[j][part];
        }
        float* total = sums + i * kBlock + chunk + part * L;
        store(total, load<Float>(total) + scale * group);
      }
    }
  }
}

// The bias, or zeros.
template <typename T, int L>
FUSED_LORA_INLINE void begin_sums(float* sums, int64_t M, const T* bias, int64_t count) {
  using C = Chunk<T, L>;
  for (int64_t chunk = 0; chunk < count; chunk += C::elements) {
    T elements[C::elements] = {};
    if (bias != nullptr) {
      std::copy(bias + chunk, bias + std::min<int64_t>(chunk + C::elements, count), elements);
    }
    typename Lanes<L>::Float biases[C::vectors];
    C::read(elements, biases);
    for (int64_t i = 0; i < M; ++i) {
      store(sums + i * kBlock + chunk, biases);
    }
  }
}

template <typename T, int L>
FUSED_LORA_INLINE void add_matrix(float* sums, int64_t M, float scale, const Rows& a, const Lines<T>& w, int64_t first,
                                  int64_t count) {
  // as many vectors of w as registers hold
  constexpr int kLines = (L == 16 ? 16 : 8) / Chunk<T, L>::vectors;
  int64_t line = 0;
  for (; line + kLines <= w.size; line += kLines) {
    add_lines<T, L, kLines>(sums, M, scale, a, w, line, first, count);
  }
  for (; line < w.size; ++line) {
    add_lines<T, L, 1>(sums, M, scale, a, w, line, first, count);
  }
}

// Columns from begin * kUnit on.
template <typename T, int L>
FUSED_LORA_INLINE void sums_of_lines(const Operands<T>& of, int64_t begin, int64_t end) {
  using C = Chunk<T, L>;
  using Float = typename Lanes<L>::Float;
  std::vector<float> buffer(of.M * kBlock);
  float* sums = buffer.data();
  const int64_t last = std::min(end * kUnit, of.P);
  for (int64_t first = begin * kUnit; first < last; first += kBlock) {
    const int64_t count = std::min(kBlock, last - first);
    begin_sums<T, L>(sums, of.M, of.bias == nullptr ? nullptr : of.bias + first, count);
    add_matrix<T, L>(sums, of.M, 1.0f, of.a, of.w, first, count);
    add_matrix<T, L>(sums, of.M, of.scale, of.h, of.v, first, count);
    for (int64_t i = 0; i < of.M; ++i) {
      for (int64_t chunk = 0; chunk < count; chunk += C::elements) {
        Float totals[C::vectors];
        for (int part = 0; part < C::vectors; ++part) {
          totals[part] = load<Float>(sums + i * kBlock + chunk + part * L);
        }
        T elements[C::elements];
        C::write(elements, totals);
        T* to = of.out + i * of.P + first + chunk;
        std::copy(elements, elements + std::min<int64_t>(C::elements, count - chunk), to);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------
// The same for each set of instructions
// --------------------------------------------------------------------------------------------------

// from, row by row, in a chunk's order.
template <typename T, int L>
FUSED_LORA_INLINE void unpack(const T* from, Rows& to) {
  using C = Chunk<T, L>;
  for (int64_t row = 0; row < to.size; ++row, from += to.length) {
    for (int64_t first = 0; first < to.length; first += C::elements) {
      T elements[C::elements] = {};
      std::copy(from + first, from + std::min<int64_t>(first + C::elements, to.length), elements);
      typename Lanes<L>::Float vectors[C::vectors];
      C::read(elements, vectors);
      store(to.values.data() + row * to.stride + first, vectors);
    }
  }
}

template <typename T>
struct Version {
  void (*unpack)(const T*, Rows&);
  void (*dots)(const Operands<T>&, int64_t, int64_t);
  void (*sums_of_lines)(const Operands<T>&, int64_t, int64_t);
};

#define FUSED_LORA_VERSION(name, lanes, ...)                                                 \
  template <typename T>                                                                      \
  struct name {                                                                              \
    __VA_ARGS__ static void unpack_(const T* from, Rows& to) { unpack<T, lanes>(from, to); } \
    __VA_ARGS__ static void dots_(const Operands<T>& of, int64_t begin, int64_t end) {       \
      dots<T, lanes>(of, begin, end);                                                        \
    }                                                                                        \
    __VA_ARGS__ static void sums_(const Operands<T>& of, int64_t begin, int64_t end) {       \
      sums_of_lines<T, lanes>(of, begin, end);                                               \
    }                                                                                        \
    static constexpr Version<T> version{unpack_, dots_, sums_};                              \
  };

#ifdef __x86_64__
FUSED_LORA_VERSION(Avx2, 8, __attribute__((target("avx2,fma"))))
FUSED_LORA_VERSION(Avx512, 16, __attribute__((target("avx512f"))))
#else
FUSED_LORA_VERSION(Baseline, 4)
#endif

// PyTorch's own choice, so that ATEN_CPU_CAPABILITY rules both; null where there is no instruction that multiplies and
// adds with one rounding, without which the sums would be less exact than a library's.
template <typename T>
const Version<T>* version() {
#ifdef __x86_64__
  static const std::string capability = at::get_cpu_capability();
  return capability == "AVX512" ? &Avx512<T>::version : capability == "AVX2" ? &Avx2<T>::version : nullptr;
#else
  return &Baseline<T>::version;
#endif
}

template <typename T>
Rows in_chunks(const at::Tensor& tensor) {
  Rows rows(tensor.size(0), tensor.size(1));
  version<T>()->unpack(tensor.contiguous().template const_data_ptr<T>(), rows);
  return rows;
}

template <typename T>
Rows in_order(const at::Tensor& tensor) {
  Rows rows(tensor.size(0), tensor.size(1));
  const at::Tensor contiguous = tensor.contiguous();
  const T* from = contiguous.template const_data_ptr<T>();
  for (int64_t row = 0; row < rows.size; ++row) {
    for (int64_t i = 0; i < rows.length; ++i) {
      rows.values[row * rows.stride + i] = static_cast<float>(from[row * rows.length + i]);
    }
  }
  return rows;
}

// lines: (size, length), the lines contiguous.
template <typename T>
Lines<T> lines_of(const at::Tensor& lines) {
  return {lines.const_data_ptr<T>(), lines.size(0), lines.size(1), lines.stride(0)};
}

template <typename T>
void small_m_product_of(const at::Tensor& out, const at::Tensor& a, const at::Tensor& w, const at::Tensor& h,
                        const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale) {
  const bool columns = w.stride(0) == 1;
  const auto unpacked = columns ? in_chunks<T> : in_order<T>;
  const at::Tensor v_lines = (columns ? v.t() : v).contiguous();
  const at::Tensor bias_values = bias ? bias->contiguous() : at::Tensor();
  Operands<T> of;
  of.out = out.mutable_data_ptr<T>();
  of.M = out.size(0);
  of.P = out.size(1);
  of.scale = static_cast<float>(scale);
  of.a = unpacked(a);
  of.w = lines_of<T>(columns ? w.t() : w);
  of.h = unpacked(h);
  of.v = lines_of<T>(v_lines);
  of.bias = bias ? bias_values.const_data_ptr<T>() : nullptr;

  const int64_t unit = columns ? kColumns : kUnit;
  const int64_t grain = std::max<int64_t>(1, kGrain / (unit * of.M * std::max<int64_t>(1, a.size(1))));
  const auto run = columns ? version<T>()->dots : version<T>()->sums_of_lines;
  at::parallel_for(0, (of.P + unit - 1) / unit, grain, [&](int64_t begin, int64_t end) { run(of, begin, end); });
}

}  // namespace

bool is_for_small_m(const at::Tensor& a, const at::Tensor& w) {
  // measured on AVX-512 (benchmarks/native.py): up to 16 rows in float32 it is faster than MKL's products on AMD; in
  // bfloat16 oneDNN's, of bfloat16 instructions, overtake it
  const int64_t most_rows = a.scalar_type() == at::kFloat ? 16 : a.scalar_type() == at::kBFloat16 ? 4 : 0;
  return version<float>() != nullptr && a.size(0) >= 1 && a.size(0) <= most_rows && w.size(0) >= 1 && w.size(1) >= 1 &&
         (w.stride(0) == 1 || w.stride(1) == 1);
}

void small_m_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& w, const at::Tensor& h,
                     const at::Tensor& v, const std::optional<at::Tensor>& bias, double scale) {
  if (a.scalar_type() == at::kFloat) {
    small_m_product_of<float>(out, a, w, h, v, bias, scale);
  } else {
    small_m_product_of<BFloat16>(out, a, w, h, v, bias, scale);
  }
}

}  // namespace fused_lora::cpu
