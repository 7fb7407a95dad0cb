// A block of CUDA threads on a CPU: each thread is a fiber, which runs until it waits for others. Included by a kernel's
// source in place of its few lines of PTX, each of which is here once more, written from the PTX ISA.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

#define DEVICE static inline
#define __global__
#define __launch_bounds__(...)
#define SHARED u16* const shared = shared_memory.data()

struct Place {
    int x;
};
static Place threadIdx, blockIdx;

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "%s (block %d, thread %d)\n", what, blockIdx.x, threadIdx.x);
    abort();
}

// ---- memory: what may be read, and shared memory that holds NaN until it is written to

static std::vector<std::pair<const char*, const char*>> readable;
static std::vector<u16> shared_memory;

static void check_read(const void* start, size_t bytes) {
    for (auto [low, high] : readable)
        if (low <= (const char*)start && (const char*)start + bytes <= high)
            return;
    fail("read outside of the arguments");
}

DEVICE Four read(const Four* source) { return check_read(source, 16), *source; }

DEVICE u32 read(const u32* source) { return check_read(source, 4), *source; }

static void check_shared(const u16* start, int numbers) {
    if ((size_t)start % 16 || start < shared_memory.data() || start + numbers > shared_memory.data() + shared_memory.size())
        fail("outside of shared memory, or not aligned");
}

// ---- threads

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static int waits; // one after the other without progress

static void give_way() {
    int self = threadIdx.x;
    swapcontext(&fibers[self], &scheduler);
    threadIdx.x = self;
}

static int parked[THREADS / 32]; // threads of each warp that wait for all, or are done

struct Barrier {
    int arrived = 0, rounds = 0;

    void wait(int members) {
        int round = rounds;
        parked[threadIdx.x / 32] += members == THREADS;
        if (++arrived == members) {
            arrived = waits = 0;
            rounds++;
            if (members == THREADS)
                memset(parked, 0, sizeof parked);
        }
        while (round == rounds) {
            if (++waits > 1000000)
                fail("threads wait for each other");
            give_way();
        }
    }
};

static Barrier all, of_warp[THREADS / 32];

DEVICE void barrier() { all.wait(THREADS); }

DEVICE void together() {
    if (THREADS > 32)
        of_warp[threadIdx.x / 32].wait(32);
    else
        all.wait(32);
}

// ---- copies in the background: as early as they may be made, or as late

struct Copy {
    u16* target;
    const u16* source;
};
static bool late;
static std::vector<std::vector<Copy>> groups[THREADS];

static void make(const Copy& one) {
    one.source ? memcpy(one.target, one.source, 16) : memset(one.target, 0, 16);
}

DEVICE void copy(u16* target, const u16* source, bool there) {
    check_shared(target, 8);
    if ((size_t)source % 16)
        fail("16 bytes are copied from an address that is no multiple");
    if (there)
        check_read(source, 16);
    auto& mine = groups[threadIdx.x];
    if (mine.empty())
        mine.emplace_back();
    Copy one = {target, there ? source : nullptr};
    late ? mine.back().push_back(one) : make(one);
}

DEVICE void close_group() {
    auto& mine = groups[threadIdx.x];
    if (mine.empty())
        mine.emplace_back();
    mine.emplace_back(); // the last one is open
}

template <int LEFT> DEVICE void wait_groups() {
    auto& mine = groups[threadIdx.x];
    while ((int)mine.size() - 1 > LEFT) {
        for (auto& one : mine.front())
            make(one);
        mine.erase(mine.begin());
    }
}

// ---- what the threads of a warp do together

static const u16* rows[THREADS];
static Four lefts[THREADS];
static u32 rights[THREADS][4], codes[THREADS];

DEVICE void load_transposed(u32 (&b)[4], const u16* row) {
    check_shared(row, 8);
    rows[threadIdx.x] = row;
    together();
    int lane = threadIdx.x % 32, base = threadIdx.x - lane;
    for (int matrix = 0; matrix < 4; matrix++) {
        const u16** eight = rows + base + 8 * matrix + lane % 4 * 2;
        b[matrix] = eight[0][lane / 4] | (u32)eight[1][lane / 4] << 16;
    }
    together();
}

DEVICE float widened(u16 bits) {
#if BFLOAT
    u32 word = (u32)bits << 16;
    float number;
    memcpy(&number, &word, 4);
    return number;
#else
    _Float16 number;
    memcpy(&number, &bits, 2);
    return number;
#endif
}

DEVICE u16 rounded(float number) {
#if BFLOAT
    u32 word;
    memcpy(&word, &number, 4);
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
#else
    _Float16 half = number;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

DEVICE u16 half_of(u32 word, int upper) { return word >> 16 * upper; }

// Row g or g + 8 of the first operand is with the threads 4 g to 4 g + 3, column c of the second with 4 c to 4 c + 3.
template <int SELECTOR> DEVICE void multiply(float (&d)[4], const Four& a, const u32 (&b)[4], u32 positions) {
    lefts[threadIdx.x] = a;
    memcpy(rights[threadIdx.x], b, 16);
    codes[threadIdx.x] = positions;
    together();
    int lane = threadIdx.x % 32, base = threadIdx.x - lane;
    for (int part = 0; part < 4; part++) {
        int lower = part / 2, four = base + lane / 4 * 4, column = lane % 4 * 2 + part % 2;
        for (int quad = 0; quad < 8; quad++) {
            u32 code = codes[four + 2 * SELECTOR + quad / 4] >> (16 * lower + quad % 4 * 4);
            if ((code & 3) >= (code >> 2 & 3))
                fail("two positions do not rise");
            for (int which = 0; which < 2; which++) {
                int k = 4 * quad + (code >> 2 * which & 3);
                float left = widened(half_of(lefts[four + quad % 4].part[quad / 4 * 2 + lower], which));
                d[part] += left * widened(half_of(rights[base + 4 * column + k % 8 / 2][k / 8], k % 2));
            }
        }
    }
    together();
}

// ---- a launch

static void (*body)();
static bool done[THREADS];

static void run_fiber(int thread) {
    threadIdx.x = thread;
    body();
    done[thread] = true;
    parked[thread / 32]++;
}

static void run_block(int block, int shared_bytes) {
    const size_t stack = 1 << 17;
    static std::vector<char> stacks(stack * THREADS);
    blockIdx.x = block;
    shared_memory.assign(shared_bytes / 2, 0x7FFF);
    fibers.assign(THREADS, ucontext_t());
    for (int thread = 0; thread < THREADS; thread++) {
        groups[thread].clear();
        done[thread] = false;
        getcontext(&fibers[thread]);
        fibers[thread].uc_stack = {.ss_sp = stacks.data() + stack * thread, .ss_flags = 0, .ss_size = stack};
        fibers[thread].uc_link = &scheduler;
        makecontext(&fibers[thread], (void (*)())run_fiber, 1, thread);
    }
    memset(parked, 0, sizeof parked);
    for (int left = THREADS; left;) // each warp goes as far as it can without the others
        for (int warp = 0; warp < THREADS / 32; warp++)
            do
                for (int thread = 32 * warp; thread < 32 * warp + 32; thread++)
                    if (!done[thread]) {
                        swapcontext(&scheduler, &fibers[thread]);
                        left -= done[thread];
                    }
            while (parked[warp] < 32 && left);
}
