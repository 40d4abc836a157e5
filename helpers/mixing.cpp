// (Σ aₗ·Wₗ)∗x of stride 1 and its gradients, on CPUs with AVX-512. `mixing.py` compiles and calls this.
//
// Every image has a kernel of its own. Written to memory for a whole batch, mixed kernels would cost more
// time than the convolutions. So a thread mixes a part of the kernels of four images, multiplies with it
// while it is in the core's cache, and forgets it. Products are oneDNN's, through PyTorch's `brgemm`.
//
// * Forward, the k·c numbers that a kernel's row meets are laid side by side for each position of a map
//   (`unfold`): row dy is one product, positions × k·c times k·c × out, for the positions where it meets the map.
// * The gradient of x is a convolution of the output's gradient with the kernels turned by 180°.
// * An image's kernel gradient is, for each row dy, a product out × positions times positions × k·c;
//   `backward_kernels` turns those of four images into gradients of the bank W and of a.
//
// Maps lie b×h×w×c, kernels out×k×k×c; c and out are multiples of 8. Second factors are 32-bit words, each a
// float32 number or two bfloat16 numbers of neighbouring rows; most functions need not know which of the two.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <type_traits>

using at::BFloat16;
using at::native::cpublas::brgemm, at::native::cpublas::brgemm_release;
using Size = int64_t;
using Floats = __m512;
using Words = __m512i;
using Mask = __mmask16;

template <class T> constexpr Size PER_WORD = 4 / sizeof(T);
constexpr Size LANES = 16;         // words in a vector
constexpr Size IMAGES = 4;         // whose kernels are mixed together: the bank is read once for all
constexpr Size AT_ONCE = 1 << 20;  // numbers of factors that a thread of `gradients` lays out,
constexpr Size PART = 1 << 16;     // and of an image's kernel gradient that it computes, at a time

struct Shape {
  Size b, height, width, c, out, k, L, half, turned, copies;
  Size positions() const { return height * width; }
  Size row() const { return k * c; }
  Size kernel() const { return k * k * c; }  // of one output channel
  // The map's rows, from the first to before the end, for which a kernel's row dy meets a row of the map.
  Size first(Size dy) const { return std::clamp<Size>(k / 2 - dy, 0, height); }
  Size end(Size dy) const { return std::clamp<Size>(height + k / 2 - dy, first(dy), height); }
};

template <class T> struct Buffer {  // from the start of a cache line
  T* at;
  explicit Buffer(Size n) : at(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
    if (at == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
};

// ---- vectors of 16 numbers or words; with a mask, of the first few
static Mask lanes(Size n) { return n >= LANES ? 0xffff : n > 0 ? (1 << n) - 1 : 0; }
static Words halves(const BFloat16* at, Mask mask) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at));
}
static Floats load(const float* at) { return _mm512_loadu_ps(at); }
static Floats load(const BFloat16* at) { return (Floats)_mm512_slli_epi32(halves(at, 0xffff), 16); }

static void store(float* at, Floats v, Mask mask = 0xffff) { _mm512_mask_storeu_ps(at, mask, v); }
static void store(BFloat16* at, Floats v, Mask mask = 0xffff) {
  _mm256_mask_storeu_epi16(at, mask, (__m256i)_mm512_cvtneps_pbh(v));
}

static Words words(const float* row, const float*, Mask mask) { return _mm512_maskz_loadu_epi32(mask, row); }
static Words words(const BFloat16* row, const BFloat16* next, Mask mask) {
  return halves(row, mask) | _mm512_slli_epi32(halves(next, mask), 16);
}

// ---- factors of products

// The words of a matrix (rows×columns, rows `stride` apart): of each row, or of each two.
template <class T> void to_words(const T* from, Size stride, Size rows, Size columns, T* to) {
  for (Size r = 0; r < rows; r += PER_WORD<T>, to += PER_WORD<T> * columns)
    for (Size i = 0; i < columns; i += LANES) {
      const T *at = from + r * stride + i, *next = at + stride;
      _mm512_mask_storeu_epi32(to + PER_WORD<T> * i, lanes(columns - i), words(at, next, lanes(columns - i)));
    }
}

// 16×16 words: shuffled into each other four times, rows have become columns.
static void transpose(Words* rows) {
  typedef int Ints __attribute__((vector_size(64)));
  const auto shuffle = [](const Words* from, Words* to) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const Ints a = (Ints)from[i], b = (Ints)from[i + 8];
      to[2 * i] = (Words)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      to[2 * i + 1] =
          (Words)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  };
  Words other[LANES];
  shuffle(rows, other), shuffle(other, rows), shuffle(rows, other), shuffle(other, rows);
}

// The words of a matrix (rows×columns) transposed, columns `to_stride` apart.
template <class T>
void transpose(const T* from, Size stride, Size rows, Size columns, T* to, Size to_stride) {
  for (Size r = 0; r < rows; r += LANES * PER_WORD<T>)
    for (Size column = 0; column < columns; column += LANES) {
      const Size high = (rows - r) / PER_WORD<T>, wide = columns - column;
      const T* at = from + r * stride + column;
      Words tile[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i, at += PER_WORD<T> * stride)
        tile[i] = words(at, at + stride, i < high ? lanes(wide) : 0);
      transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        _mm512_mask_storeu_epi32(to + (column + i) * to_stride + r, i < wide ? lanes(high) : 0, tile[i]);
    }
}

// positions × k·c from rows of maps: the k neighbours of each position, zeros beyond the row's ends.
template <class T> void unfold(const T* x, Size rows, const Shape& s, T* to) {
  for (Size y = 0; y < rows; ++y, x += s.width * s.c)
    for (Size column = 0; column < s.width; ++column, to += s.row()) {
      const Size left = column - s.k / 2, from = std::max<Size>(left, 0);
      const Size count = std::min(left + s.k, s.width) - from;
      if (count < s.k) std::memset((void*)to, 0, s.row() * sizeof(T));
      std::memcpy((void*)(to + (from - left) * s.c), x + from * s.c, count * s.c * sizeof(T));
    }
}

// The largest multiple of 8 up to `most`, another one, that divides n.
static Size divisor(Size n, Size most) {
  while (n % most) most -= 8;
  return most;
}

// f(number of images, first image): for IMAGES images together, or for each of fewer.
template <class F> void for_images(Size images, const F& f) {
  if (images == IMAGES) return f(std::integral_constant<int, IMAGES>(), 0);
  for (Size j = 0; j < images; ++j) f(std::integral_constant<int, 1>(), j);
}

// ---- the convolution

// The place (dy, dx) of a block of output channels' kernels, from `first` on, as words of c × block. Turned
// kernels, which lie c×k×k×out, are taken from the last place to the first.
template <class T> void pack(const T* weight, const Shape& s, Size first, Size block, Size place, T* to) {
  const Size places = s.k * s.k;
  if (s.turned) return to_words(weight + (places - 1 - place) * s.out + first, places * s.out, s.c, block, to);
  const T* from = weight + (first * places + place) * s.c;  // where two channels are a word already
  transpose((const float*)from, s.kernel() / PER_WORD<T>, block, s.c / PER_WORD<T>, (float*)to, block);
}

// kernels (images×n) = a (images×L) · bank (L×n), in words of one branch or of two.
template <int images, class T>
void mix_kernels(const T* a, const T* bank, Size stride, Size L, T* kernels, Size n) {
  for (Size i = 0; i < n; i += LANES) {
    Floats sums[images] = {};
    for (Size l = 0; l < L; l += PER_WORD<T>) {
      const Words w = _mm512_loadu_si512(bank + l * stride + i * PER_WORD<T>);
      for (int j = 0; j < images; ++j) {
        const Words weight = _mm512_broadcastd_epi32(_mm_loadu_si32(a + j * L + l));
        if constexpr (PER_WORD<T> == 1)
          sums[j] = _mm512_fmadd_ps((Floats)weight, (Floats)w, sums[j]);
        else
          sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)weight, (__m512bh)w);
      }
    }
    for (int j = 0; j < images; ++j) store(kernels + j * n + i, sums[j]);
  }
}

// y (b×h×w×out) from x (b×h×w×c) and a (b×L, in bfloat16 with a zero if L is odd). If `turned`, y is the
// gradient of x and x that of y: c and out have changed places, and kernels lie c×k×k×out.
template <class T> void convolve(const T* x, const T* a, T* y, const T* const* weights, const Shape& s) {
  const Size block = divisor(s.out, 64), places = s.k * s.k, positions = s.positions();
  const Size place = s.c * block, part = s.k * place, all = places * s.c * s.out;
  const Size L = (s.L + PER_WORD<T> - 1) / PER_WORD<T> * PER_WORD<T>;
  Buffer<T> bank(L * all);  // in words of branches, for each block and place
  at::parallel_for(0, L * all / place / PER_WORD<T>, 1, [&](Size from, Size end) {
    Buffer<T> packed(PER_WORD<T> * place);
    for (Size i = from; i < end; ++i) {
      for (Size j = 0; j < PER_WORD<T>; ++j) {
        const Size l = std::min(i * place / all * PER_WORD<T> + j, s.L - 1);
        pack(weights[l], s, i / places * block % s.out, block, i % places, packed.at + j * place);
      }
      to_words(packed.at, place, PER_WORD<T>, place, bank.at + i * place * PER_WORD<T>);
    }
  });
  at::parallel_for(0, s.b, IMAGES, [&](Size start, Size end) {
    Buffer<T> unfolded(IMAGES * positions * s.row()), kernels(IMAGES * part);
    Buffer<float> sums(IMAGES * positions * block);
    for (Size first = start; first < end; first += IMAGES) {
      const Size images = std::min(IMAGES, end - first);
      unfold(x + first * positions * s.c, images * s.height, s, unfolded.at);
      for (Size out = 0; out < s.out; out += block) {
        T* to = y + first * positions * s.out + out;
        const Size stride = PER_WORD<T> == 1 ? s.out : block;
        float* sum = PER_WORD<T> == 1 ? (float*)to : sums.at;
        for (Size nth = 0; nth < s.k; ++nth) {
          const Size dy = (nth + s.k / 2) % s.k;  // the middle first: it meets all rows of the map
          const T* row = bank.at + (out / block * s.k + dy) * part * PER_WORD<T>;
          for_images(images, [&](auto n, Size j) {
            mix_kernels<n>(a + (first + j) * L, row, all, L, kernels.at + j * part, part);
          });
          const Size to_p = s.first(dy) * s.width, count = s.end(dy) * s.width - to_p;
          const Size from_p = to_p + (dy - s.k / 2) * s.width;
          for (Size j = 0; j < images && count; ++j)
            brgemm(count, block, s.row(), s.row(), block, stride, nth > 0,
                   unfolded.at + (j * positions + from_p) * s.row(), kernels.at + j * part,
                   sum + (j * positions + to_p) * stride, PER_WORD<T> > 1);
        }
        if constexpr (PER_WORD<T> > 1)
          for (Size p = 0; p < images * positions; ++p)
            for (Size i = 0; i < block; i += LANES)
              store(to + p * s.out + i, load(sum + p * block + i), lanes(block - i));
      }
    }
    brgemm_release(PER_WORD<T> > 1);
  });
}

// ---- the gradients of the kernels and of a

// From n numbers of the kernel gradients of some images: += aᵀ·grads to those of some branches, `stride`
// numbers apart in the bank's gradient, and += ⟨grads, W⟩ to that of a.
template <int images, int branches, class T>
void backward_kernels(const float* grads, Size n, const float* a, Size L, const T* const* weights, Size offset,
                      float* grad_bank, Size stride, float* grad_a) {
  Floats products[images][branches] = {};
  for (Size i = 0; i < n; i += LANES) {
    Floats w[branches], sum[branches];
    for (int l = 0; l < branches; ++l)
      w[l] = load(weights[l] + offset + i), sum[l] = load(grad_bank + l * stride + offset + i);
    for (int j = 0; j < images; ++j) {
      const Floats grad = load(grads + j * n + i);
      for (int l = 0; l < branches; ++l) {
        sum[l] = _mm512_fmadd_ps(_mm512_set1_ps(a[j * L + l]), grad, sum[l]);
        products[j][l] = _mm512_fmadd_ps(w[l], grad, products[j][l]);
      }
    }
    for (int l = 0; l < branches; ++l) store(grad_bank + l * stride + offset + i, sum[l]);
  }
  for (int j = 0; j < images; ++j)
    for (int l = 0; l < branches; ++l) grad_a[j * L + l] += _mm512_reduce_add_ps(products[j][l]);
}

// By one thread, of its b images: the gradients of a (b×L) and of the bank (L×out×k×k×c), added to zeros. In
// bfloat16 the maps' width is even, so that no word is of two rows.
template <class T>
void gradients(Size b, const T* x, const T* grad, const float* a, float* grad_bank, float* grad_a,
               const T* const* weights, const Shape& s) {
  const Size rows = divisor(s.out, std::clamp<Size>(PART / s.kernel() / 8 * 8, 8, 32));
  const Size part = rows * s.kernel(), positions = s.positions(), factor = positions * s.row();
  const Size stride = positions / LANES * LANES + 2 * LANES;  // no power of two: those share cache lines
  const Size at_once = std::max<Size>(AT_ONCE / (factor + s.out * stride) / IMAGES, 1) * IMAGES;
  Buffer<T> unfolded(factor), factors(at_once * factor), transposed(at_once * s.out * stride);
  Buffer<float> grads(IMAGES * part);
  std::memset(grads.at, 0, IMAGES * part * sizeof(float));  // for rows dy that never meet the map
  for (Size first = 0; first < b; first += at_once) {
    const Size count = std::min(at_once, b - first);
    for (Size j = 0; j < count; ++j) {
      T* to = factors.at + j * factor;
      unfold(x + (first + j) * positions * s.c, s.height, s, PER_WORD<T> > 1 ? unfolded.at : to);
      if (PER_WORD<T> > 1) to_words(unfolded.at, s.row(), positions, s.row(), to);
      transpose(grad + (first + j) * positions * s.out, s.out, positions, s.out,
                transposed.at + j * s.out * stride, stride);
    }
    for (Size row = 0; row < s.out; row += rows)
      for (Size some = 0; some < count; some += IMAGES) {
        const Size images = std::min(IMAGES, count - some);
        for (Size i = 0; i < images * s.k; ++i) {
          const Size j = i / s.k, dy = i % s.k, p = s.first(dy) * s.width, inner = s.end(dy) * s.width - p;
          if (inner)
            brgemm(rows, s.row(), inner, stride, s.row(), s.kernel(), false,
                   transposed.at + ((some + j) * s.out + row) * stride + p,
                   factors.at + (some + j) * factor + (p + (dy - s.k / 2) * s.width) * s.row(),
                   grads.at + j * part + dy * s.row(), PER_WORD<T> > 1);
        }
        for_images(images, [&](auto n, Size j) {
          for (Size l = 0; l < s.L; l += 2) {
            const Size at = (first + some + j) * s.L + l;
            const auto add = l + 1 < s.L ? backward_kernels<n, 2, T> : backward_kernels<n, 1, T>;
            add(grads.at + j * part, part, a + at, s.L, weights + l, row * s.kernel(),
                grad_bank + l * s.out * s.kernel(), s.out * s.kernel(), grad_a + at);
          }
        });
      }
  }
  brgemm_release(PER_WORD<T> > 1);
}

template <class T> void run(const Shape& s, void* const* p) {
  const auto weights = (const T* const*)p;
  p += s.L;
  const auto x = (const T*)p[0], y = (const T*)p[1];
  if (s.copies == 0) return convolve(x, (const T*)p[2], (T*)p[1], weights, s);
  const auto a = (const float*)p[2];
  const auto grad_bank = (float*)p[3], grad_a = (float*)p[4];
  at::parallel_for(0, s.copies, 1, [&](Size from, Size end) {
    for (Size copy = from; copy < end; ++copy) {
      const Size first = s.b * copy / s.copies;
      gradients(s.b * (copy + 1) / s.copies - first, x + first * s.positions() * s.c,
                y + first * s.positions() * s.out, a + first * s.L,
                grad_bank + copy * s.L * s.out * s.kernel(), grad_a + first * s.L, weights, s);
    }
  });
}

// What `mixing.py` calls: gives whether memory was short, or oneDNN refused a product.
extern "C" int run(const Shape* s, void* const* arrays) {
  try {
    s->half ? run<BFloat16>(*s, arrays) : run<float>(*s, arrays);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}
