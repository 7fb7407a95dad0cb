// skip.cu as a function for a CPU: the launch of a whole grid.

#include "skip.cu"

static struct {
    const void *entries, *pointers, *xt;
    void* y;
    long long numbers[8];
} given;

static void call() {
    const long long* n = given.numbers;
    product((const Four*)given.entries, (const u32*)given.pointers, (const u16*)given.xt, given.y, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
}

// ``arrays``: entries, pointers, xt, y; ``bytes``: their sizes; ``numbers``: the kernel's integers
extern "C" void launch(int programs, int shared_bytes, int copies_late, void** arrays, const long long* bytes, const long long* numbers) {
    given = {arrays[0], arrays[1], arrays[2], arrays[3], {}};
    memcpy(given.numbers, numbers, sizeof given.numbers);
    readable.clear();
    for (int array = 0; array < 3; array++)
        readable.push_back({(const char*)arrays[array], (const char*)arrays[array] + bytes[array]});
    late = copies_late;
    body = call;
    for (int program = 0; program < programs; program++)
        run_block(program, shared_bytes);
}
