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
// kernels of L branches; how many output (`convolve`) or input channels (`gradients`) at a time; and by
// how many threads, each with an image of its own, or several. A branch's kernels lie out×k×k×c; if they
// are `turned`, c×k×k×out, and are taken from their last place to the first.
struct Shape {
  Size b, height, width, c, out, k, L, block, threads, turned;
  Size wide() const { return width + k - 1; }  // of a row with its rim
  Size a_row() const { return L + L % 2; }     // numbers of `a` for an image in `convolve`
  Size first(Size thread) const { return b * thread / threads; }  // of a thread's images
  // A kernel's rows, the middle one first: the one that meets a row of the image everywhere.
  Size from_the_middle(Size nth) const { return (nth + k / 2) % k; }
  // The rows of a map, from the first one to before the end, where row dy of a kernel meets a row of the
  // map, not zeros above it or below: to leave out the others spares small maps a good part of the work.
  Size first_row(Size dy) const { return std::clamp<Size>(k / 2 - dy, 0, height); }
  Size end_row(Size dy) const { return std::clamp<Size>(height + k / 2 - dy, first_row(dy), height); }
};

// Images whose kernels are mixed together, and whose kernels' gradients are led back together: each
// number of the bank is then read once for all of them.
constexpr Size MIXED = 4, LED_BACK = 8;
// Numbers that a thread of `gradients` lays out for products at a time, unless LED_BACK images are more.
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

// Memory from the start of a cache line.
template <class T> struct Buffer {
  T* at;
  explicit Buffer(Size count) {
    at = static_cast<T*>(std::aligned_alloc(64, bytes(count)));
    if (at == nullptr) failed = true;
  }
  ~Buffer() { std::free(at); }
  Buffer(const Buffer&) = delete;
  static Size bytes(Size count) { return (count * sizeof(T) + 63) / 64 * 64; }
};

template <class T> struct Zeros : Buffer<T> {
  explicit Zeros(Size count) : Buffer<T>(count) {
    if (this->at != nullptr) std::memset(static_cast<void*>(this->at), 0, this->bytes(count));
  }
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

// Rounded to the nearest, to even. (Without the instruction for it no bfloat16 numbers come here, as
// `mixing.fits` has it.)
static void store(BFloat16* to, Floats v) {
#ifdef __AVX512BF16__
  const auto h = _mm512_cvtneps_pbh((__m512)v);
#else
  Words w = (Words)v;
  const Halves h = __builtin_convertvector((w + 0x7fff + ((w >> 16) & 1)) >> 16, Halves);
#endif
  std::memcpy(static_cast<void*>(to), &h, sizeof h);
}

// to (m×n, rows `to_row` apart) = or += from (m×inner, rows `from_row` apart) · factor (inner×n, in
// bfloat16 with two and two rows interleaved). Rows of `from` may overlap: those of neighbouring
// positions do, and so no patch has to be copied.
template <class T>
void multiply(Size m, Size n, Size inner, const T* from, Size from_row, const T* factor, float* to,
              Size to_row, bool add) {
  try {
    at::native::cpublas::brgemm(m, n, inner, from_row, n, to_row, add, from, factor, to,
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

// Two vectors shuffled into each other: the first half of the result, then the second.
template <class V> void shuffle(V a, V b, V* to) {
  to[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  to[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Rows for columns: shuffled four times, 16×16 numbers have changed them.
template <class V> void transpose(V* tile) {
  V other[LANES];
  for (int times = 0; times < 2; ++times) {
    for (int i = 0; i < 8; ++i) shuffle(tile[i], tile[i + 8], other + 2 * i);
    for (int i = 0; i < 8; ++i) shuffle(other[i], other[i + 8], tile + 2 * i);
  }
}

// columns×rows (`to_row` numbers apart) from rows×columns (`from_row` apart).
template <class T>
void transpose(const T* from, Size from_row, Size rows, Size columns, T* to, Size to_row) {
  using Vector = typename Numbers<T>::Vector;
  for (Size r = 0; r < rows; r += LANES)
    for (Size column = 0; column < columns; column += LANES) {
      const T* corner = from + r * from_row + column;
      T* target = to + column * to_row + r;
      const Size high = std::min(LANES, rows - r), wide = std::min(LANES, columns - column);
      Vector tile[LANES];
      if (high == LANES && wide == LANES) {  // in registers, without a call
        for (int i = 0; i < LANES; ++i) std::memcpy(tile + i, corner + i * from_row, sizeof(Vector));
        transpose(tile);
        for (int i = 0; i < LANES; ++i)
          std::memcpy(static_cast<void*>(target + i * to_row), tile + i, sizeof(Vector));
      } else {
        std::memset(tile, 0, sizeof tile);
        for (Size i = 0; i < high; ++i) std::memcpy(tile + i, corner + i * from_row, wide * sizeof(T));
        transpose(tile);
        for (Size i = 0; i < wide; ++i)
          std::memcpy(static_cast<void*>(target + i * to_row), tile + i, high * sizeof(T));
      }
    }
}

// Two and two rows of `count` numbers interleaved, if the second factor of a product wants it.
static void interleave(const BFloat16* from, Size from_row, Size rows, Size count, BFloat16* to) {
  const auto* halves = reinterpret_cast<const uint16_t*>(from);
  auto* words = reinterpret_cast<uint32_t*>(to);
  for (Size r = 0; r < rows; r += 2)
    for (Size i = 0; i < count; ++i)
      words[r / 2 * count + i] =
          halves[r * from_row + i] | uint32_t(halves[(r + 1) * from_row + i]) << 16;
}

static void interleave(const float* from, Size from_row, Size rows, Size count, float* to) {
  spread(from, from_row, rows, count, to, count);
}

// The kernels as second factors: L×(out/block)×k×(k·c)×block, in bfloat16 with two and two channels c
// interleaved, so that each row of a mixed kernel is one product. Words of 32 bits are transposed:
// numbers of float32, or two channels' in bfloat16, which are neighbours in the kernels too.
template <class T> void lay_out(const T* const* kernels, const Shape& s, T* bank) {
  constexpr Size pair = Numbers<T>::pair;
  const Size blocks = s.out / s.block, places = s.k * s.k;
#pragma omp for schedule(static)
  for (Size part = 0; part < s.L * blocks * places; ++part) {
    const Size place = part % places, block = part / places % blocks, l = part / places / blocks;
    T* to = bank + part * s.c * s.block;
    if (s.turned) {
      const T* from = kernels[l] + (places - 1 - place) * s.out + block * s.block;
      interleave(from, places * s.out, s.c, s.block, to);
    } else {
      const T* from = kernels[l] + (block * s.block * places + place) * s.c;
      transpose(reinterpret_cast<const float*>(from), places * s.c / pair, s.block, s.c / pair,
                reinterpret_cast<float*>(to), s.block);
    }
  }
}

// kernels (images×n) = a (images×L, rows of `a_row`) · bank (L×n, rows of `bank_row`).
template <int images, class T>
void mix(const T* a, Size a_row, const T* bank, Size bank_row, Size L, T* kernels, Size n) {
  for (Size i = 0; i < n; i += LANES) {
    Floats sums[images] = {};
    for (Size l = 0; l < L; ++l) {
      const Floats w = load(bank + l * bank_row + i);
      for (int j = 0; j < images; ++j) sums[j] += float(a[j * a_row + l]) * w;
    }
    for (int j = 0; j < images; ++j) store(kernels + j * n + i, sums[j]);
  }
}

#ifdef __AVX512BF16__
// The same with an instruction that multiplies and adds the numbers of two branches (of the last one
// and zeros, if L is odd). To pair 32 numbers with 32, the first four of every 8 go into one vector, the
// others into another; in the end they are put back into their order.
template <int images>
void mix(const BFloat16* a, Size a_row, const BFloat16* bank, Size bank_row, Size L, BFloat16* kernels,
         Size n) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (Size i = 0; i < n; i += 2 * LANES) {
    __m512 low[images] = {}, high[images] = {};
    for (Size l = 0; l < L; l += 2) {
      const __m512i one = _mm512_loadu_si512(bank + l * bank_row + i);
      const __m512i other =
          l + 1 < L ? _mm512_loadu_si512(bank + (l + 1) * bank_row + i) : _mm512_setzero_si512();
      const auto w_low = (__m512bh)_mm512_unpacklo_epi16(one, other);
      const auto w_high = (__m512bh)_mm512_unpackhi_epi16(one, other);
      for (int j = 0; j < images; ++j) {
        int two;
        std::memcpy(&two, a + j * a_row + l, sizeof two);
        const auto weights = (__m512bh)_mm512_set1_epi32(two);
        low[j] = _mm512_dpbf16_ps(low[j], w_low, weights);
        high[j] = _mm512_dpbf16_ps(high[j], w_high, weights);
      }
    }
    for (int j = 0; j < images; ++j) {
      const auto mixed = (__m512i)_mm512_cvtne2ps_pbh(high[j], low[j]);
      _mm512_storeu_si512(kernels + j * n + i, _mm512_permutexvar_epi64(order, mixed));
    }
  }
}
#endif

// For so many images: MIXED, but for a thread's last ones.
template <class T>
void mix(Size images, const T* a, const T* bank, Size bank_row, const Shape& s, T* kernels, Size n) {
  if (images == MIXED)
    mix<MIXED>(a, s.a_row(), bank, bank_row, s.L, kernels, n);
  else
    for (Size j = 0; j < images; ++j)
      mix<1>(a + j * s.a_row(), s.a_row(), bank, bank_row, s.L, kernels + j * n, n);
}

// An image for products with the rows of kernels: for each position, the k·c numbers that a row of a
// kernel meets lie one after the other; zeros at the ends of rows are there already. In wide maps they
// are neighbours' own, which overlap; in narrow ones they are copied, so that one product takes all
// positions.
template <class T> void first_factor(const T* x, const Shape& s, T* to) {
  if (s.width >= WIDE) {
    spread(x, s.width * s.c, s.height, s.width * s.c, to + s.k / 2 * s.c, s.wide() * s.c);
    return;
  }
  for (Size dx = 0; dx < s.k; ++dx) {
    const Size left = dx - s.k / 2, from = std::max<Size>(left, 0);  // columns that `dx` meets
    const Size count = std::max<Size>(s.width - std::abs(left), 0);
    for (Size y = 0; y < s.height; ++y)
      spread(x + (y * s.width + from) * s.c, s.c, count, s.c,
             to + ((y * s.width + from - left) * s.k + dx) * s.c, s.k * s.c);
  }
}

// Sums for x′, and where they lie: in x′ itself, if its numbers are of that type.
struct Sums {
  float* at;
  Size row;
};

static Sums sums_for(float* x_new, const Shape& s, float*) { return {x_new, s.out}; }
static Sums sums_for(BFloat16*, const Shape& s, float* memory) { return {memory, s.block}; }

static void rounded(const float*, const Shape&, Size, float*) {}

static void rounded(const float* sums, const Shape& s, Size positions, BFloat16* x_new) {
  for (Size p = 0; p < positions; ++p) {
    const float* from = sums + p * s.block;
    BFloat16* to = x_new + p * s.out;
    Size i = 0;
    for (; i + LANES <= s.block; i += LANES) store(to + i, load(from + i));
    for (; i < s.block; ++i) to[i] = BFloat16(from[i]);
  }
}

// x′ of all images: a row of a mixed kernel is one product, of many positions at a time.
template <class T>
void convolve(const T* x, const T* a, const T* const* branches, T* x_new, const Shape s) {
  const Size part = s.k * s.c * s.block, blocks = s.out / s.block, of_image = s.height * s.width;
  const bool wide = s.width >= WIDE;
  const Size apart = wide ? s.c : s.k * s.c, row = (wide ? s.wide() : s.width) * apart;
  const Size image = s.height * row;
  Buffer<T> bank(s.L * blocks * s.k * part);
  if (failed) return;
#pragma omp parallel num_threads(s.threads)
  {
    lay_out(branches, s, bank.at);
#pragma omp for schedule(static)
    for (Size thread = 0; thread < s.threads; ++thread) {
      Zeros<T> factors(MIXED * image);
      Buffer<T> kernels(MIXED * part);
      Buffer<float> memory(MIXED * of_image * s.block);
      if (failed) continue;
      const Size end = s.first(thread + 1);
      for (Size first = s.first(thread); first < end; first += MIXED) {
        const Size images = std::min(MIXED, end - first);
        for (Size j = 0; j < images; ++j)
          first_factor(x + (first + j) * of_image * s.c, s, factors.at + j * image);
        for (Size block = 0; block < blocks; ++block) {
          T* to = x_new + first * of_image * s.out + block * s.block;
          const Sums sums = sums_for(to, s, memory.at);
          for (Size nth = 0; nth < s.k; ++nth) {
            const Size dy = s.from_the_middle(nth), from = s.first_row(dy), past = s.end_row(dy);
            mix(images, a + first * s.a_row(), bank.at + (block * s.k + dy) * part, blocks * s.k * part, s,
                kernels.at, part);
            for (Size j = 0; j < images; ++j)
              for (Size y = from, rows = wide ? 1 : past - from; y < past; y += rows)
                multiply(rows * s.width, s.block, s.k * s.c,
                         factors.at + j * image + (y + dy - s.k / 2) * row, apart, kernels.at + j * part,
                         sums.at + (j * of_image + y * s.width) * sums.row, sums.row, nth > 0);
          }
          rounded(sums.at, s, images * of_image, to);
        }
      }
      release<T>();
    }
  }
}

// For each column dx of a kernel, which positions have a neighbour dx − k/2 columns on in the same row
// of a map: `length` numbers, of which all bits are 1, or 0.
template <class T> void neighbours(const Shape& s, Size length, T* masks) {
  for (Size dx = 0; dx < s.k; ++dx)
    for (Size p = 0; p < length; ++p) {
      const Size column = p % s.width + dx - s.k / 2;
      const int bits = column >= 0 && column < s.width ? -1 : 0;
      std::memset(static_cast<void*>(masks + dx * length + p), bits, sizeof(T));
    }
}

// An image transposed, c×positions, so that all positions that a place of the kernel meets begin at an
// offset; zeros are there already. A wide map has rims at all sides, and what lies across the end of a
// row is multiplied in vain with the zeros that end each row of gradients. A narrow one has none at the
// left and the right, and lies k times instead, moved once for each column of the kernel.
template <class T>
void first_factor_across(const T* x, const Shape& s, const T* masks, T* to, Size row, Size copy) {
  using Vector = typename Numbers<T>::Vector;
  const Size rim = s.k / 2;
  if (s.width >= WIDE) {
    for (Size y = 0; y < s.height; ++y)
      transpose(x + y * s.width * s.c, s.c, s.width, s.c, to + (y + rim) * s.wide() + rim, row);
    return;
  }
  T* middle = to + rim * copy;
  transpose(x, s.c, s.height * s.width, s.c, middle + rim * s.width, row);
  for (Size dx = 0; dx < s.k; ++dx) {
    if (dx == rim) continue;
    for (Size i = 0; i < copy; i += LANES) {
      Vector numbers, mask;
      std::memcpy(&numbers, middle + i + dx - rim, sizeof numbers);
      std::memcpy(&mask, masks + dx * row + i % row, sizeof mask);
      numbers &= mask;
      std::memcpy(static_cast<void*>(to + dx * copy + i), &numbers, sizeof numbers);
    }
  }
}

// An image of gradients as the second factor of a product: a row for each position, `columns` of
// them for a row of the image, whose last ones are zeros, which are there already, here and in `rows`.
static void second_factor(const float* grad, const Shape& s, Size columns, float*, Size, float* to) {
  spread(grad, s.width * s.out, s.height, s.width * s.out, to, columns * s.out);
}

static void second_factor(const BFloat16* grad, const Shape& s, Size columns, BFloat16* rows,
                          Size positions, BFloat16* to) {
  const bool together = columns == s.width && positions == s.height * s.width;
  if (!together) spread(grad, s.width * s.out, s.height, s.width * s.out, rows, columns * s.out);
  interleave(together ? grad : rows, s.out, positions, s.out, to);
}

// From the gradients of some images' kernels (images×n) to those of the bank (grad_bank = or +=
// aᵀ·grads) and of a (images×L, += ⟨grads, bank⟩), for as many branches as `branches`.
template <int images, int branches, class T>
void lead_back(const float* grads, Size n, const float* a, const T* bank, float* grad_bank, Size row,
               Size L, float* grad_a, bool add) {
  Floats products[images][branches] = {};
  for (Size i = 0; i < n; i += LANES) {
    Floats w[branches], sum[branches];
    for (int l = 0; l < branches; ++l) {
      w[l] = load(bank + l * row + i);
      sum[l] = add ? load(grad_bank + l * row + i) : Floats{};
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
               Size L, float* grad_a, bool add) {
  Size l = 0;
  for (; l + 2 <= L; l += 2)
    lead_back<images, 2>(grads, n, a + l, bank + l * row, grad_bank + l * row, row, L, grad_a + l, add);
  if (l < L)
    lead_back<images, 1>(grads, n, a + l, bank + l * row, grad_bank + l * row, row, L, grad_a + l, add);
}

// L×(k·k)×c×out from L kernels, out×(k·k)×c: a place's numbers lie together.
template <class T> void by_place(const T* const* kernels, const Shape& s, T* bank) {
  const Size places = s.k * s.k;
#pragma omp for schedule(static)
  for (Size part = 0; part < s.L * places; ++part) {
    const Size l = part / places, place = part % places;
    transpose(kernels[l] + place * s.c, places * s.c, s.out, s.c, bank + part * s.c * s.out, s.out);
  }
}

// Back to kernels from the threads' banks, which are added up.
static void by_kernel(float* banks, const Shape& s, float* kernels) {
  const Size places = s.k * s.k, of_place = s.c * s.out;
#pragma omp for schedule(static)
  for (Size part = 0; part < s.L * places; ++part) {
    const Size l = part / places, place = part % places;
    float* sum = banks + part * of_place;
    for (Size thread = 1; thread < s.threads; ++thread)
      for (Size i = 0; i < of_place; ++i) sum[i] += sum[thread * s.L * places * of_place + i];
    transpose(sum, s.out, s.c, s.out, kernels + (l * s.out * places + place) * s.c, places * s.c);
  }
}

// The gradients of a, b×L, added to zeros, and of the kernels, as a bank for each thread. A thread has
// images of its own, and what it makes of them no other one reads.
template <class T>
void kernel_gradients(const T* x, const T* grad, const float* a, const T* const* branches,
                      float* grad_banks, float* grad_a, const Shape& s) {
  constexpr Size pair = Numbers<T>::pair;
  const Size copies = s.width < WIDE ? s.k : 1, columns = s.width < WIDE ? s.width : s.wide();
  const Size positions = (s.height * columns + pair - 1) / pair * pair, of_image = s.height * s.width;
  const Size laid = (s.height + s.k - 1) * columns;  // positions of a copy, with rims
  const Size image_row = (laid + s.k + LANES) / LANES * LANES, copy = s.c * image_row;
  const Size image = copies * copy, places = s.k * s.k, piece = s.block * s.out;
  const Size row = places * s.c * s.out, most = s.b / s.threads + 1;
  const Size fit = LAID_OUT / (image + positions * s.out);
  const Size at_once = std::max(std::min(fit, most + LED_BACK) / LED_BACK * LED_BACK, LED_BACK);
  const bool in_place = pair == 1 && columns == s.width;  // gradients are second factors as they lie
  Buffer<T> banks(s.L * row), masks(copies * image_row);
  if (failed) return;
  if (copies > 1) neighbours(s, image_row, masks.at);
#pragma omp parallel num_threads(s.threads)
  {
    by_place(branches, s, banks.at);
#pragma omp for schedule(static)
    for (Size thread = 0; thread < s.threads; ++thread) {
      Zeros<T> rows(positions * s.out), images(at_once * image);
      Zeros<T> grads(in_place ? 1 : at_once * positions * s.out);
      Buffer<float> kernels(LED_BACK * piece);
      if (failed) continue;
      const T* bank = banks.at;
      float* grad_bank = grad_banks + thread * s.L * row;
      const Size start = s.first(thread), end = s.first(thread + 1);
      for (Size first = start; first < end; first += at_once) {
        const Size laid_out = std::min(at_once, end - first);
        for (Size j = 0; j < laid_out; ++j) {
          first_factor_across(x + (first + j) * of_image * s.c, s, masks.at, images.at + j * image,
                              image_row, copy);
          if (!in_place)
            second_factor(grad + (first + j) * of_image * s.out, s, columns, rows.at, positions,
                          grads.at + j * positions * s.out);
        }
        const T* factors = in_place ? grad + first * of_image * s.out : grads.at;
        for (Size place = 0; place < places; ++place)
          for (Size block = 0; block < s.c; block += s.block)
            for (Size some = 0; some < laid_out; some += LED_BACK) {
              const Size count = std::min(LED_BACK, laid_out - some), to = (place * s.c + block) * s.out;
              const Size dy = place / s.k, dx = place % s.k;
              Size skipped = s.first_row(dy) * columns / pair * pair;
              Size met = (s.end_row(dy) * columns + pair - 1) / pair * pair - skipped;
              if (s.first_row(dy) == s.end_row(dy)) skipped = 0, met = positions;  // to have zeros
              const Size from = dy * columns + dx * (copies > 1 ? copy : 1) + block * image_row + skipped;
              for (Size j = 0; j < count; ++j)
                multiply(s.block, s.out, met, images.at + (some + j) * image + from, image_row,
                         factors + ((some + j) * positions + skipped) * s.out, kernels.at + j * piece,
                         s.out, false);
              const Size at = (first + some) * s.L;
              const bool add = first + some > start;
              if (count == LED_BACK)
                lead_back<LED_BACK>(kernels.at, piece, a + at, bank + to, grad_bank + to, row, s.L,
                                    grad_a + at, add);
              else
                for (Size j = 0; j < count; ++j)
                  lead_back<1>(kernels.at + j * piece, piece, a + at + j * s.L, bank + to, grad_bank + to,
                               row, s.L, grad_a + at + j * s.L, add || j > 0);
            }
      }
      release<T>();
    }
  }
}

// The gradients of a, b×L, added to zeros, and of the kernels, L×out×(k·k)×c. What else the threads need
// for them is given back before they are put into that order.
template <class T>
void gradients(const T* x, const T* grad, const float* a, const T* const* branches, float* grad_kernels,
               float* grad_a, const Shape s) {
  Buffer<float> grad_banks(s.threads * s.L * s.k * s.k * s.c * s.out);
  if (failed) return;
  kernel_gradients(x, grad, a, branches, grad_banks.at, grad_a, s);
#pragma omp parallel num_threads(s.threads)
  by_kernel(grad_banks.at, s, grad_kernels);
}

// Each gives whether the library refused a product, or the memory was short.
#define FOR(T, NAME)                                                                             \
  bool convolve_##NAME(const T* x, const T* a, const T* const* kernels, T* x_new,                \
                       const Shape* s) {                                                         \
    const std::lock_guard<std::mutex> alone(one_call);                                           \
    failed = false;                                                                              \
    convolve(x, a, kernels, x_new, *s);                                                          \
    return failed;                                                                               \
  }                                                                                              \
  bool gradients_##NAME(const T* x, const T* grad, const float* a, const T* const* kernels,      \
                        float* grad_kernels, float* grad_a, const Shape* s) {                    \
    const std::lock_guard<std::mutex> alone(one_call);                                           \
    failed = false;                                                                              \
    gradients(x, grad, a, kernels, grad_kernels, grad_a, *s);                                    \
    return failed;                                                                               \
  }

extern "C" {
FOR(float, float32)
FOR(BFloat16, bfloat16)
}
