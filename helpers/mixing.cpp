// Convolutions of each image with a kernel of its own, mixed from L kernels, and their gradients.
// `helpers/mixing.py` compiles and calls this, and says how the arrays lie. The stride is 1.
//
// A mixed kernel is as large as a convolution's kernel, so that making one for each image and
// convolving with it, one call after the other, is bound by memory on small maps. Here a part of the
// kernels of a few images is mixed, multiplied and forgotten while it is in the cache of one core.
// The products are oneDNN's, through PyTorch: small matrices at nearly the speed of large ones.

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>

#include <immintrin.h>

using at::BFloat16;
using Size = int64_t;

// What one call works on: b images of height×width positions, c channels in and `out` out, k×k
// kernels of L branches; and how many output (forward) or input channels (backward) at a time.
struct Shape {
  Size b, height, width, c, out, k, L, block, threads;
  Size wide() const { return width + k - 1; }  // of a row with its rim
};

// Images whose kernels are mixed together, and whose kernels' gradients are led back together: each
// number of the bank is then read once for all of them.
constexpr Size MIXED = 4, LED_BACK = 8;
// Numbers that a thread lays out for products at a time, unless LED_BACK images are more.
constexpr Size LAID_OUT = 1 << 20;
constexpr Size WIDE = 32;  // positions in a row of a map, from which on rims cost less than copies
constexpr Size LANES = 16;  // channels are multiples of 8, so that parts of kernels are multiples of it

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class T> struct Numbers;
template <> struct Numbers<float> {
  using Vector = Words;
  static constexpr Size pair = 1;  // rows that lie interleaved in the second factor of a product
};
template <> struct Numbers<BFloat16> {
  using Vector = Halves;
  static constexpr Size pair = 2;
};

static std::atomic<bool> failed;  // an exception must not leave a thread
static std::mutex one_call;

// Zeros, from the start of a cache line.
template <class T> struct Buffer {
  T* at;
  explicit Buffer(Size count) {
    const Size bytes = (count * sizeof(T) + 63) / 64 * 64;
    at = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (at == nullptr)
      failed = true;
    else
      std::memset(static_cast<void*>(at), 0, bytes);
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
};

static Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

static Floats load(const BFloat16* from) {
  Halves h;
  std::memcpy(&h, from, sizeof h);
  return (Floats)(__builtin_convertvector(h, Words) << 16);
}

static void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

static void store(BFloat16* to, Floats v) {  // rounded to the nearest, to even
#ifdef __AVX512BF16__
  const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
  Words w = (Words)v;
  const Halves h = __builtin_convertvector((w + 0x7fff + ((w >> 16) & 1)) >> 16, Halves);
#endif
  std::memcpy(static_cast<void*>(to), &h, sizeof h);
}

// to (m×n) = or += from (m×inner, rows `from_row` apart) · factor (inner×n, in bfloat16 with two and
// two rows interleaved). Rows of `from` may overlap: those of neighbouring positions do, and so no
// patch has to be copied.
template <class T>
void multiply(Size m, Size n, Size inner, const T* from, Size from_row, const T* factor, float* to,
              bool add) {
  try {
    at::native::cpublas::brgemm(m, n, inner, from_row, n, n, add, from, factor, to,
                                Numbers<T>::pair == 2);
  } catch (const std::exception&) {
    failed = true;
  }
}

template <class T> void release() {  // the tiles of a CPU that has some
  if (Numbers<T>::pair == 2) at::native::cpublas::brgemm_release(true);
}

// Rows of `count` numbers each, from `from_apart` numbers apart to `apart`.
template <class T>
void spread(const T* from, Size from_apart, Size rows, Size count, T* to, Size apart) {
  for (Size r = 0; r < rows; ++r)
    std::memcpy(static_cast<void*>(to + r * apart), from + r * from_apart, count * sizeof(T));
}

// Which positions of an image's row meet a column of the kernel, and where they lie in a row of
// positions that begin with the first one that the kernel is laid upon.
struct Part {
  Size from, to, count;
};

static Part met(const Shape& s, Size dx, Size columns) {
  const Size left = dx - s.k / 2, from = std::max<Size>(left, 0), to = from - left;
  return {from, to, std::max<Size>(std::min(s.width - from, columns - to), 0)};
}

// kernels (images×n) = a (images×L) · bank (L×n, rows of `bank_row`).
template <int images, class T>
void mix(const float* a, const T* bank, Size bank_row, Size L, T* kernels, Size n) {
  for (Size i = 0; i < n; i += LANES) {
    Floats sums[images] = {};
    for (Size l = 0; l < L; ++l) {
      const Floats w = load(bank + l * bank_row + i);
      for (int j = 0; j < images; ++j) sums[j] += a[j * L + l] * w;
    }
    for (int j = 0; j < images; ++j) store(kernels + j * n + i, sums[j]);
  }
}

// An image for products with the rows of kernels: for each position, also above and below the image,
// the k·c numbers that a row of a kernel meets lie one after the other; zeros are there already. In
// wide maps they are neighbours' own, which overlap; in narrow ones they are copied, so that one
// product takes all positions.
template <class T> void first_factor(const T* x, const Shape& s, T* to) {
  if (s.width >= WIDE) {
    spread(x, s.width * s.c, s.height, s.width * s.c, to + (s.k / 2) * (s.wide() + 1) * s.c,
           s.wide() * s.c);
    return;
  }
  for (Size dx = 0; dx < s.k; ++dx) {
    const Part part = met(s, dx, s.width);
    for (Size y = 0; y < s.height; ++y)
      spread(x + (y * s.width + part.from) * s.c, s.c, part.count, s.c,
             to + (((y + s.k / 2) * s.width + part.to) * s.k + dx) * s.c, s.k * s.c);
  }
}

// x′ of all images. The bank is L×(out/block)×k×(k·c)×block, in bfloat16 with two and two channels c
// interleaved, so that each row of a kernel is one product, of many positions at a time.
template <class T>
void convolve(const T* x, const float* a, const T* bank, T* x_new, const Shape s) {
  const Size part = s.k * s.c * s.block, blocks = s.out / s.block, of_image = s.height * s.width;
  const bool wide = s.width >= WIDE;
  const Size apart = wide ? s.c : s.k * s.c, row = (wide ? s.wide() : s.width) * apart;
  const Size image = (s.height + s.k - 1) * row, rows = wide ? 1 : s.height;  // in one product
#pragma omp parallel num_threads(s.threads)
  {
    Buffer<T> factors(MIXED * image), kernels(MIXED * part);
    Buffer<float> sums(MIXED * of_image * s.block);
#pragma omp for schedule(static)
    for (Size first = 0; first < s.b; first += MIXED) {
      if (failed) continue;
      const Size images = std::min(MIXED, s.b - first);
      for (Size j = 0; j < images; ++j)
        first_factor(x + (first + j) * of_image * s.c, s, factors.at + j * image);
      for (Size block = 0; block < blocks; ++block) {
        for (Size dy = 0; dy < s.k; ++dy) {
          const T* banks = bank + (block * s.k + dy) * part;
          const Size bank_row = blocks * s.k * part;
          if (images == MIXED)
            mix<MIXED>(a + first * s.L, banks, bank_row, s.L, kernels.at, part);
          else
            for (Size j = 0; j < images; ++j)
              mix<1>(a + (first + j) * s.L, banks, bank_row, s.L, kernels.at + j * part, part);
          for (Size j = 0; j < images; ++j)
            for (Size y = 0; y < s.height; y += rows)
              multiply(rows * s.width, s.block, s.k * s.c, factors.at + j * image + (y + dy) * row, apart,
                       kernels.at + j * part, sums.at + (j * of_image + y * s.width) * s.block, dy > 0);
        }
        for (Size p = 0; p < images * of_image; ++p) {
          const float* from = sums.at + p * s.block;
          T* to = x_new + (first * of_image + p) * s.out + block * s.block;
          Size i = 0;
          for (; i + LANES <= s.block; i += LANES) store(to + i, load(from + i));
          for (; i < s.block; ++i) to[i] = T(from[i]);
        }
      }
    }
    release<T>();
  }
}

// Two vectors shuffled into each other: the first half of the result, then the second.
template <class V> void shuffle(V a, V b, V* to) {
  to[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  to[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// c×positions (rows of `to_row`) from positions×c. Shuffled four times, 16×16 numbers have changed
// rows for columns.
template <class T> void transpose(const T* from, Size positions, Size c, T* to, Size to_row) {
  using Vector = typename Numbers<T>::Vector;
  for (Size p = 0; p < positions; p += LANES)
    for (Size channel = 0; channel < c; channel += LANES) {
      const Size rows = std::min(LANES, positions - p), columns = std::min(LANES, c - channel);
      Vector tile[LANES] = {}, other[LANES];
      if (columns == LANES)  // of known length, without a call
        for (Size i = 0; i < rows; ++i) std::memcpy(tile + i, from + (p + i) * c + channel, sizeof(Vector));
      else
        for (Size i = 0; i < rows; ++i)
          std::memcpy(tile + i, from + (p + i) * c + channel, columns * sizeof(T));
      for (int times = 0; times < 2; ++times) {
        for (int i = 0; i < 8; ++i) shuffle(tile[i], tile[i + 8], other + 2 * i);
        for (int i = 0; i < 8; ++i) shuffle(other[i], other[i + 8], tile + 2 * i);
      }
      for (Size i = 0; i < columns; ++i)
        std::memcpy(static_cast<void*>(to + (channel + i) * to_row + p), tile + i, sizeof(Vector));
    }
}

// An image of gradients as the second factor of a product: a row for each position, `columns` of
// them for a row of the image, whose last ones are zeros, which are there already, here and in `rows`;
// in bfloat16 two and two rows interleaved.
static void second_factor(const float* grad, const Shape& s, Size columns, float*, Size, float* to) {
  spread(grad, s.width * s.out, s.height, s.width * s.out, to, columns * s.out);
}

static void second_factor(const BFloat16* grad, const Shape& s, Size columns, BFloat16* rows,
                          Size positions, BFloat16* to) {
  spread(grad, s.width * s.out, s.height, s.width * s.out, rows, columns * s.out);
  const auto* halves = reinterpret_cast<const uint16_t*>(rows);
  auto* words = reinterpret_cast<uint32_t*>(to);
  for (Size p = 0; p < positions; p += 2)
    for (Size i = 0; i < s.out; ++i)
      words[p / 2 * s.out + i] = halves[p * s.out + i] | uint32_t(halves[(p + 1) * s.out + i]) << 16;
}

// From the gradients of some images' kernels (images×n) to those of the bank (grad_bank += aᵀ·grads)
// and of a (images×L, += ⟨grads, bank⟩), for as many branches as `branches`.
template <int images, int branches, class T>
void lead_back(const float* grads, Size n, const float* a, const T* bank, float* grad_bank, Size row,
               Size L, float* grad_a) {
  Floats products[images][branches] = {};
  for (Size i = 0; i < n; i += LANES) {
    Floats w[branches], sum[branches];
    for (int l = 0; l < branches; ++l) {
      w[l] = load(bank + l * row + i);
      sum[l] = load(grad_bank + l * row + i);
    }
    for (int j = 0; j < images; ++j) {
      const Floats g = load(grads + j * n + i);
      for (int l = 0; l < branches; ++l) {
        sum[l] += a[j * L + l] * g;
        products[j][l] += w[l] * g;
      }
    }
    for (int l = 0; l < branches; ++l) store(grad_bank + l * row + i, sum[l]);
  }
  for (int j = 0; j < images; ++j)
    for (int l = 0; l < branches; ++l) {
      float total = 0;
      for (int lane = 0; lane < LANES; ++lane) total += products[j][l][lane];
      grad_a[j * L + l] += total;
    }
}

// For all branches: two at a time, so that each gradient is read half as often.
template <int images, class T>
void lead_back(const float* grads, Size n, const float* a, const T* bank, float* grad_bank, Size row,
               Size L, float* grad_a) {
  Size l = 0;
  for (; l + 2 <= L; l += 2)
    lead_back<images, 2>(grads, n, a + l, bank + l * row, grad_bank + l * row, row, L, grad_a + l);
  if (l < L)
    lead_back<images, 1>(grads, n, a + l, bank + l * row, grad_bank + l * row, row, L, grad_a + l);
}

// The gradients of a, b×L, and of the bank, L×(k·k)×c×out like the bank itself, one for each thread;
// both to be added to zeros. A thread has images of its own, and what it makes of them, in parts that
// stay in the cache, no other one reads. Images lie transposed, so that the rows of all positions that
// meet a place of the kernel begin at an offset. Wide maps have rims at all sides, where gradients are
// zeros, which is multiplied in vain; narrow ones lie k times instead, once for each column of the
// kernel, moved so that it meets them without rims at the left and the right.
template <class T>
void gradients(const T* x, const T* grad, const float* a, const T* bank, float* grad_banks,
               float* grad_a, const Shape s) {
  constexpr Size pair = Numbers<T>::pair;
  const Size copies = s.width < WIDE ? s.k : 1, columns = s.width < WIDE ? s.width : s.wide();
  const Size positions = (s.height * columns + pair - 1) / pair * pair, of_image = s.height * s.width;
  const Size laid = (s.height + s.k - 1) * columns;  // positions of a copy, with rims
  const Size image_row = (laid + s.k + LANES) / LANES * LANES, copy = s.c * image_row;
  const Size image = copies * copy, places = s.k * s.k, piece = s.block * s.out;
  const Size row = places * s.c * s.out, each = (s.b + s.threads - 1) / s.threads;
  const Size fit = LAID_OUT / (image + positions * s.out);
  const Size at_once = std::max(std::min(fit, each + LED_BACK) / LED_BACK * LED_BACK, LED_BACK);
#pragma omp parallel for num_threads(s.threads) schedule(static)
  for (Size thread = 0; thread < s.threads; ++thread) {
    Buffer<T> rimmed(copies * laid * s.c), rows(positions * s.out);
    Buffer<T> images(at_once * image), grads(at_once * positions * s.out);
    Buffer<float> kernels(LED_BACK * piece);
    if (failed) continue;
    float* grad_bank = grad_banks + thread * s.L * row;
    const Size end = std::min(s.b, (thread + 1) * each);
    for (Size first = thread * each; first < end; first += at_once) {
      const Size laid_out = std::min(at_once, end - first);
      for (Size j = 0; j < laid_out; ++j) {
        for (Size dx = 0; dx < copies; ++dx) {
          const Part part = met(s, dx, columns);
          T* moved = rimmed.at + dx * laid * s.c;
          spread(x + ((first + j) * of_image + part.from) * s.c, s.width * s.c, s.height,
                 part.count * s.c, moved + (s.k / 2 * columns + part.to) * s.c, columns * s.c);
          transpose(moved, laid, s.c, images.at + j * image + dx * copy, image_row);
        }
        second_factor(grad + (first + j) * of_image * s.out, s, columns, rows.at, positions,
                      grads.at + j * positions * s.out);
      }
      for (Size place = 0; place < places; ++place)
        for (Size block = 0; block < s.c; block += s.block)
          for (Size some = 0; some < laid_out; some += LED_BACK) {
            const Size count = std::min(LED_BACK, laid_out - some), to = (place * s.c + block) * s.out;
            const Size dy = place / s.k, dx = place % s.k;
            const Size from = dy * columns + dx * (copies > 1 ? copy : 1) + block * image_row;
            for (Size j = 0; j < count; ++j)
              multiply(s.block, s.out, positions, images.at + (some + j) * image + from, image_row,
                       grads.at + (some + j) * positions * s.out, kernels.at + j * piece, false);
            const Size at = (first + some) * s.L;
            if (count == LED_BACK)
              lead_back<LED_BACK>(kernels.at, piece, a + at, bank + to, grad_bank + to, row, s.L,
                                  grad_a + at);
            else
              for (Size j = 0; j < count; ++j)
                lead_back<1>(kernels.at + j * piece, piece, a + at + j * s.L, bank + to, grad_bank + to,
                             row, s.L, grad_a + at + j * s.L);
          }
    }
    release<T>();
  }
}

// Each gives whether the library refused a product, or the memory was short.
#define FOR(T, NAME)                                                                             \
  bool convolve_##NAME(const T* x, const float* a, const T* bank, T* x_new, const Shape* s) {    \
    const std::lock_guard<std::mutex> alone(one_call);                                           \
    failed = false;                                                                              \
    convolve(x, a, bank, x_new, *s);                                                             \
    return failed;                                                                               \
  }                                                                                              \
  bool gradients_##NAME(const T* x, const T* grad, const float* a, const T* bank,                \
                        float* grad_bank, float* grad_a, const Shape* s) {                       \
    const std::lock_guard<std::mutex> alone(one_call);                                           \
    failed = false;                                                                              \
    gradients(x, grad, a, bank, grad_bank, grad_a, *s);                                          \
    return failed;                                                                               \
  }

extern "C" {
FOR(float, float32)
FOR(BFloat16, bfloat16)
}
