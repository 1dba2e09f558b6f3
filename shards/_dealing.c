/* One stored chunk, read, checked, decoded and dealt to the batches in flight without Python in between.
 *
 * The chunk is blosc's (version 1 frames, zstd, byte shuffle): a header of 16 bytes, the place of each block, then for
 * each block its length and one zstd frame of the planes of its bytes. The planes are joined straight into the rows of
 * the batches, in place of a scratch that is copied. zstd is the one that numcodecs brings (shards/dealing.py).
 *
 * What is stored is not trusted: every length is checked against what is there. Anything unusual gives False, and the
 * caller reads the chunk by way of numcodecs, which says what is wrong with it.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <nmmintrin.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if !defined(__x86_64__) || !defined(__GLIBC__)
#error "built on x86-64 with glibc only; elsewhere chunks are decoded by numcodecs alone"
#endif

typedef size_t (*decompress_fn)(void *, void *, size_t, const void *, size_t);
typedef void *(*create_fn)(void);
typedef size_t (*free_fn)(void *);

static decompress_fn zstd_decompress;
static create_fn zstd_create;
static free_fn zstd_free;

/* --- crc32c --- */

enum { LANE = 4096, CRC_NBYTES = 4 };

/* What a checksum becomes over LANE zero bytes, by each of its bytes. */
static uint32_t over_lane[4][256];

static uint32_t u32(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

static uint64_t u64(const uint8_t *p)
{
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

__attribute__((target("sse4.2"))) static uint32_t crc_run(uint32_t crc, const uint8_t *p, size_t n)
{
    uint64_t value = crc;
    for (; n >= 8; p += 8, n -= 8)
        value = _mm_crc32_u64(value, u64(p));
    while (n--)
        value = _mm_crc32_u8((uint32_t)value, *p++);
    return (uint32_t)value;
}

static uint32_t crc_shift(uint32_t crc)
{
    return over_lane[0][crc & 255] ^ over_lane[1][crc >> 8 & 255] ^ over_lane[2][crc >> 16 & 255]
        ^ over_lane[3][crc >> 24];
}

/* The instruction has a latency of three cycles and a throughput of one: three lanes at a time. */
__attribute__((target("sse4.2"))) static uint32_t crc32c(const uint8_t *p, size_t n)
{
    uint64_t a = 0xffffffff;
    for (; n >= 3 * LANE; p += 3 * LANE, n -= 3 * LANE) {
        uint64_t b = 0, c = 0;
        for (size_t i = 0; i < LANE; i += 8) {
            a = _mm_crc32_u64(a, u64(p + i));
            b = _mm_crc32_u64(b, u64(p + LANE + i));
            c = _mm_crc32_u64(c, u64(p + 2 * LANE + i));
        }
        a = crc_shift(crc_shift((uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
    }
    return ~crc_run((uint32_t)a, p, n);
}

static void crc_prepare(void)
{
    static const uint8_t zeros[LANE];
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t value = 0; value < 256; value++)
            over_lane[byte][value] = crc_run(value << 8 * byte, zeros, LANE);
}

/* --- bytes --- */

__attribute__((target_clones("avx2", "default"))) static void join2(
    uint8_t *restrict out, const uint8_t *restrict planes, size_t stride, size_t n)
{
    const uint8_t *restrict low = planes, *restrict high = planes + stride;
    uint16_t *restrict to = (uint16_t *)out;
    for (size_t i = 0; i < n; i++)
        to[i] = (uint16_t)(low[i] | high[i] << 8);
}

__attribute__((target_clones("avx2", "default"))) static void join4(
    uint8_t *restrict out, const uint8_t *restrict planes, size_t stride, size_t n)
{
    const uint8_t *restrict a = planes, *restrict b = planes + stride;
    const uint8_t *restrict c = planes + 2 * stride, *restrict d = planes + 3 * stride;
    uint32_t *restrict to = (uint32_t *)out;
    for (size_t i = 0; i < n; i++)
        to[i] = (uint32_t)a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16 | (uint32_t)d[i] << 24;
}

/* --- a decoder: the memory of one thread --- */

typedef struct {
    PyObject_HEAD
    uint8_t *stored, *planes;
    size_t stored_size, planes_size;
    void *zstd;
} Decoder;

static int reserve(uint8_t **memory, size_t *size, size_t wanted)
{
    if (*size >= wanted)
        return 1;
    uint8_t *found = realloc(*memory, wanted + wanted / 8);
    if (!found)
        return 0;
    *memory = found;
    *size = wanted + wanted / 8;
    return 1;
}

/* Where a chunk's rows go: moves (source, batch, target, length, count) in the order of their sources. */
typedef struct {
    const int64_t *moves;
    Py_ssize_t n_moves;
    const uint64_t *addresses;
    int64_t row_nbytes, itemsize;
    int64_t first_row; /* of the chunk, among the rows that the moves number */
} Plan;

/* Copy elements [from, to) of the chunk, whose planes are at hand, to where the moves want them. */
static void deal_block(const Plan *plan, const uint8_t *planes, int64_t from, int64_t to)
{
    const int64_t per_row = plan->row_nbytes / plan->itemsize, skipped = plan->first_row * per_row;
    for (Py_ssize_t m = 0; m < plan->n_moves; m++) {
        const int64_t *move = plan->moves + 5 * m;
        const int64_t size = move[3] * per_row, start = move[0] * per_row - skipped;
        if (start >= to)
            break;
        int64_t piece = from > start ? (from - start) / size : 0;
        for (; piece < move[4] && start + piece * size < to; piece++) {
            const int64_t begin = start + piece * size;
            const int64_t low = begin > from ? begin : from, high = begin + size < to ? begin + size : to;
            uint8_t *out = (uint8_t *)(uintptr_t)plan->addresses[move[1] + piece] + move[2] * plan->row_nbytes
                + (low - begin) * plan->itemsize;
            (plan->itemsize == 2 ? join2 : join4)(out, planes + (low - from), (size_t)(to - from), (size_t)(high - low));
        }
    }
}

/* Check, decode and deal a stored chunk of `length` bytes, its crc32c at the end; 0 where anything is unusual. */
static int deal_chunk(Decoder *self, const Plan *plan, const uint8_t *stored, size_t length, size_t raw_nbytes)
{
    enum { HEADER = 16, SHUFFLED = 1, PLAIN = 2, BITS = 4, WHOLE_BLOCKS = 16, ZSTD = 4 };
    if (length < HEADER + CRC_NBYTES || crc32c(stored, length - CRC_NBYTES) != u32(stored + length - CRC_NBYTES))
        return 0;
    const size_t end = length - CRC_NBYTES, itemsize = (size_t)plan->itemsize, block = u32(stored + 8);
    const uint8_t flags = stored[2];
    if (stored[0] != 2 || stored[1] != 1 || stored[3] != itemsize || u32(stored + 4) != raw_nbytes
        || u32(stored + 12) != end)
        return 0;
    if ((flags & (SHUFFLED | PLAIN | BITS | WHOLE_BLOCKS)) != (SHUFFLED | WHOLE_BLOCKS) || flags >> 5 != ZSTD)
        return 0;
    if (!block || block > raw_nbytes || block % itemsize || !reserve(&self->planes, &self->planes_size, block))
        return 0;
    const size_t n_blocks = (raw_nbytes + block - 1) / block, body = HEADER + 4 * n_blocks;
    if (body > end)
        return 0;
    for (size_t b = 0; b < n_blocks; b++) {
        const size_t n = b + 1 < n_blocks ? block : raw_nbytes - b * block, place = u32(stored + HEADER + 4 * b);
        if (place < body || place + 4 > end)
            return 0;
        const size_t packed = u32(stored + place);
        if (packed > end - place - 4)
            return 0;
        if (packed == n)
            memcpy(self->planes, stored + place + 4, n);
        else if (zstd_decompress(self->zstd, self->planes, n, stored + place + 4, packed) != n)
            return 0;
        const int64_t from = (int64_t)(b * block / itemsize);
        deal_block(plan, self->planes, from, from + (int64_t)(n / itemsize));
    }
    return 1;
}

static int read_file(Decoder *self, const char *path, off_t start, size_t length)
{
    if (!reserve(&self->stored, &self->stored_size, length))
        return 0;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    size_t there = 0;
    while (there < length) {
        const ssize_t found = pread(file, self->stored + there, length - there, start + (off_t)there);
        if (found > 0)
            there += (size_t)found;
        else if (!found || errno != EINTR)
            break;
    }
    close(file);
    return there == length;
}

/* Moves that would leave the rows of a unit or of a batch are a mistake of the caller's. */
static int check_moves(const Plan *plan, Py_ssize_t n_slots, int64_t unit_rows, int64_t batch_rows)
{
    int64_t last = 0;
    for (Py_ssize_t m = 0; m < plan->n_moves; m++) {
        const int64_t source = plan->moves[5 * m], batch = plan->moves[5 * m + 1], target = plan->moves[5 * m + 2];
        const int64_t length = plan->moves[5 * m + 3], count = plan->moves[5 * m + 4];
        if (source < last || batch < 0 || target < 0 || length < 1 || count < 1 || length > batch_rows - target
            || count > n_slots - batch || length > unit_rows || count > unit_rows
            || source + length * count > unit_rows)
            return 0;
        last = source;
    }
    return 1;
}

PyDoc_STRVAR(deal_doc,
    "deal(stored, start, length, shape, first_row, moves, addresses)\n--\n\n"
    "Deal the rows of one stored chunk to batches; return whether that was done.\n\n"
    "``stored`` is the path of a file, which has the chunk at bytes ``start`` to ``start + length``, or a buffer with\n"
    "it. ``shape``: rows of a chunk, of a unit and of a batch, bytes of a row and of a number in it (2 or 4).\n"
    "``first_row``: the chunk's first among those of its unit. ``moves``: int64 [M, 5], as in ``shards.order``,\n"
    "``addresses``: uint64 [N], where each batch begins. False: nothing that counts was done, read the chunk otherwise.");

static PyObject *deal(Decoder *self, PyObject *args)
{
    PyObject *stored, *result = NULL;
    Py_ssize_t start, length;
    long long chunk_rows, unit_rows, batch_rows, row_nbytes, itemsize, first_row;
    Py_buffer moves, addresses, held = {0};
    if (!PyArg_ParseTuple(args, "Onn(LLLLL)Ly*y*", &stored, &start, &length, &chunk_rows, &unit_rows, &batch_rows,
            &row_nbytes, &itemsize, &first_row, &moves, &addresses))
        return NULL;
    const Plan plan = {
        .moves = moves.buf,
        .n_moves = moves.len / (Py_ssize_t)(5 * sizeof(int64_t)),
        .addresses = addresses.buf,
        .row_nbytes = row_nbytes,
        .itemsize = itemsize,
        .first_row = first_row,
    };
    const int whole = start >= 0 && length > 0 && chunk_rows > 0 && row_nbytes > 0 && first_row >= 0
        && chunk_rows < INT32_MAX / row_nbytes && (itemsize == 2 || itemsize == 4) && row_nbytes % itemsize == 0;
    if (!whole || !check_moves(&plan, addresses.len / (Py_ssize_t)sizeof(uint64_t), unit_rows, batch_rows)) {
        PyErr_SetString(PyExc_ValueError, "moves outside of the rows of a unit or a batch");
        goto done;
    }
    const char *path = PyBytes_Check(stored) ? PyBytes_AS_STRING(stored) : NULL;
    if (!path && PyObject_GetBuffer(stored, &held, PyBUF_SIMPLE) < 0)
        goto done;
    int dealt;
    Py_BEGIN_ALLOW_THREADS
    if (path)
        dealt = read_file(self, path, (off_t)start, (size_t)length);
    else
        dealt = start + length <= held.len;
    if (dealt)
        dealt = deal_chunk(self, &plan, path ? self->stored : (const uint8_t *)held.buf + start, (size_t)length,
            (size_t)(chunk_rows * row_nbytes));
    Py_END_ALLOW_THREADS
    result = PyBool_FromLong(dealt);
done:
    if (held.obj)
        PyBuffer_Release(&held);
    PyBuffer_Release(&moves);
    PyBuffer_Release(&addresses);
    return result;
}

static PyObject *decoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args, (void)kwargs;
    if (!zstd_decompress) {
        PyErr_SetString(PyExc_RuntimeError, "no zstd: call use_zstd first");
        return NULL;
    }
    Decoder *self = (Decoder *)type->tp_alloc(type, 0);
    if (self && !(self->zstd = zstd_create())) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void decoder_dealloc(Decoder *self)
{
    if (self->zstd)
        zstd_free(self->zstd);
    free(self->stored);
    free(self->planes);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef decoder_methods[] = {{"deal", (PyCFunction)deal, METH_VARARGS, deal_doc}, {NULL}};

static PyTypeObject decoder_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "actlake.shards._dealing.Decoder",
    .tp_basicsize = sizeof(Decoder),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_doc = "Memory to decode chunks in, of one thread.",
    .tp_new = decoder_new,
    .tp_dealloc = (destructor)decoder_dealloc,
    .tp_methods = decoder_methods,
};

/* --- the module --- */

PyDoc_STRVAR(use_zstd_doc,
    "use_zstd(decompress, create, free)\n--\n\n"
    "Set the addresses of ZSTD_decompressDCtx, ZSTD_createDCtx and ZSTD_freeDCtx.");

static PyObject *use_zstd(PyObject *module, PyObject *args)
{
    unsigned long long decompress, create, release;
    (void)module;
    if (!PyArg_ParseTuple(args, "KKK", &decompress, &create, &release))
        return NULL;
    zstd_create = (create_fn)(uintptr_t)create;
    zstd_free = (free_fn)(uintptr_t)release;
    zstd_decompress = (decompress_fn)(uintptr_t)decompress;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {{"use_zstd", use_zstd, METH_VARARGS, use_zstd_doc}, {NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "actlake.shards._dealing", "Chunks dealt to batches: shards/dealing.py.", -1, functions};

PyMODINIT_FUNC PyInit__dealing(void)
{
    if (!__builtin_cpu_supports("sse4.2")) {
        PyErr_SetString(PyExc_ImportError, "this processor has no crc32 instruction");
        return NULL;
    }
    crc_prepare();
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddType(made, &decoder_type) < 0)
        Py_CLEAR(made);
    return made;
}
