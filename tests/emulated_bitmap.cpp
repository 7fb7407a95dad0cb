// bitmap.cu as a function for a CPU: the launch of a whole grid.

#include "bitmap.cu"

static struct {
    const void *records, *starts, *x;
    void* y;
    long long numbers[7];
} given;

static void call() {
    const long long* n = given.numbers;
    product((const Four*)given.records, (const u32*)given.starts, (const u16*)given.x, given.y, n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
}

// ``arrays``: records, starts, x, y; ``bytes``: their sizes; ``numbers``: the kernel's integers
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
