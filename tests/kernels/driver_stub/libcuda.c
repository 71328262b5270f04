// A libcuda.so.1 that answers as a chosen device, checks every launch as the driver and the device would, records it,
// and runs nothing. Triton's binder, ptxas and launcher then run on a machine without a GPU.
//
// A function is described by its cubin: the sizes of its parameters, its registers, local memory and threads. A launch
// that the device would refuse returns an error, whose string says what is wrong.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MOST_PARAMETERS = 128, MOST_FUNCTIONS = 1024, MOST_LAUNCHES = 4096 };
enum { SUCCESS = 0, INVALID_VALUE = 1 };

typedef int Result;

// Of the device: set by stub_device
static int capability = 90, processors = 132, shared_per_processor = 233472, shared_per_block = 232448;

typedef struct {
  char name[64];
  int parameters, registers, local, threads, granted;  // granted: dynamic shared memory
  int sizes[MOST_PARAMETERS];
} Function;

typedef struct {
  uint64_t function;
  uint32_t grid[3], block[3], shared, parameters;
  uint64_t stream;
  uint64_t values[MOST_PARAMETERS];
  uint32_t sizes[MOST_PARAMETERS];
} Launch;

// The start of CUlaunchConfig
typedef struct {
  uint32_t grid[3], block[3], shared;
  void* stream;
} Config;

static Function functions[MOST_FUNCTIONS];
static Launch launches[MOST_LAUNCHES];
static int n_functions, n_launches;
static char error[256] = "an error of the stub";

void stub_device(int capability_, int processors_, int shared_per_processor_, int shared_per_block_) {
  capability = capability_;
  processors = processors_;
  shared_per_processor = shared_per_processor_;
  shared_per_block = shared_per_block_;
}
int stub_launches(void) {
  return n_launches;
}
void stub_clear(void) {
  n_launches = 0;
}
const Launch* stub_launch(int i) {
  return &launches[i % MOST_LAUNCHES];
}
const Function* stub_function(uint64_t f) {
  return (const Function*)f;
}

static Result refuse(const char* what, long value, long most) {
  snprintf(error, sizeof error, "%s is %ld, expected at most %ld", what, value, most);
  return INVALID_VALUE;
}

// Cubins are ELF files. Attributes of a kernel are (format, attribute, size or value) and, for format 4, that many
// bytes.

typedef struct {
  uint32_t name, type;
  uint64_t flags, address, offset, size;
  uint32_t link, info;
  uint64_t alignment, entry;
} Section;

static uint32_t word(const uint8_t* p) {
  uint32_t v;
  memcpy(&v, p, 4);
  return v;
}
static uint16_t half(const uint8_t* p) {
  uint16_t v;
  memcpy(&v, p, 2);
  return v;
}

enum { PARAMETER = 0x17, REQUIRED_THREADS = 0x10, FRAME_SIZE = 0x11, REGISTERS = 0x2f };

static void read_attributes(const uint8_t* image, const Section* s, Function* f) {
  const uint8_t *p = image + s->offset, *end = p + s->size;
  while (p < end) {
    int format = p[0], attribute = p[1], size = half(p + 2);
    const uint8_t* payload = p + 4;
    if (format == 4) {
      if (attribute == PARAMETER) {
        int ordinal = half(payload + 4);
        if (ordinal < MOST_PARAMETERS) f->sizes[ordinal] = word(payload + 8) >> 18;
        if (ordinal + 1 > f->parameters) f->parameters = ordinal + 1;
      } else if (attribute == REQUIRED_THREADS) {
        f->threads = word(payload) * word(payload + 4) * word(payload + 8);
      } else if (attribute == FRAME_SIZE) {
        f->local = f->local > (int)word(payload + 4) ? f->local : (int)word(payload + 4);
      } else if (attribute == REGISTERS) {
        f->registers = word(payload + 4);
      }
    }
    p = payload + (format == 4 ? size : 0);
  }
}

Result cuModuleGetFunction(void** function, void* module, const char* name) {
  if (n_functions == MOST_FUNCTIONS) return refuse("the number of functions", n_functions + 1, MOST_FUNCTIONS);
  const uint8_t* image = module;
  uint64_t start;
  memcpy(&start, image + 0x28, 8);
  int count = half(image + 0x3c);
  const Section* sections = (const Section*)(image + start);
  const char* names = (const char*)image + sections[half(image + 0x3e)].offset;
  Function* f = &functions[n_functions];
  memset(f, 0, sizeof *f);
  snprintf(f->name, sizeof f->name, "%s", name);
  char own[128];
  snprintf(own, sizeof own, ".nv.info.%s", name);
  for (int i = 0; i < count; ++i) {
    const char* section = names + sections[i].name;
    if (!strcmp(section, ".nv.info") || !strcmp(section, own)) read_attributes(image, &sections[i], f);
  }
  if (!f->registers || !f->threads) {
    snprintf(error, sizeof error, "%s is not a kernel of this module", name);
    return INVALID_VALUE;
  }
  *function = f;
  ++n_functions;
  return SUCCESS;
}

// Registers are allocated to warps in units of 256.
static long registers_of_block(const Function* f, long threads) {
  return (f->registers * 32 + 255) / 256 * 256 * ((threads + 31) / 32);
}

Result cuLaunchKernelEx(const Config* c, Function* f, void** parameters, void** extra) {
  (void)extra;
  static const long most_blocks[3] = {2147483647, 65535, 65535};
  static const char* grid_names[3] = {"grid x", "grid y", "grid z"};
  for (int i = 0; i < 3; ++i) {
    if (c->grid[i] < 1 || c->grid[i] > most_blocks[i]) return refuse(grid_names[i], c->grid[i], most_blocks[i]);
  }
  long threads = (long)c->block[0] * c->block[1] * c->block[2];
  if (threads < 1 || threads > 1024) return refuse("threads of a block", threads, 1024);
  if (threads != f->threads) return refuse("threads of a block", threads, f->threads);
  if (registers_of_block(f, threads) > 65536) {
    return refuse("registers of a block", registers_of_block(f, threads), 65536);
  }
  if (c->shared > (uint32_t)shared_per_block) return refuse("shared memory", c->shared, shared_per_block);
  long granted = f->granted > 49152 ? f->granted : 49152;
  if (c->shared > granted) return refuse("shared memory that was not asked for", c->shared, granted);
  Launch* l = &launches[n_launches++ % MOST_LAUNCHES];  // the oldest are overwritten
  memset(l, 0, sizeof *l);
  l->function = (uint64_t)f;
  memcpy(l->grid, c->grid, sizeof l->grid);
  memcpy(l->block, c->block, sizeof l->block);
  l->shared = c->shared;
  l->stream = (uint64_t)c->stream;
  l->parameters = f->parameters;
  for (int i = 0; i < f->parameters; ++i) {
    l->sizes[i] = f->sizes[i];
    memcpy(&l->values[i], parameters[i], f->sizes[i]);
  }
  return SUCCESS;
}

// Numbers of CUdevice_attribute and CUfunction_attribute
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 8:
      *value = 49152;
      break;  // MAX_SHARED_MEMORY_PER_BLOCK
    case 10:
      *value = 32;
      break;  // WARP_SIZE
    case 12:
      *value = 65536;
      break;  // MAX_REGISTERS_PER_BLOCK
    case 16:
      *value = processors;
      break;  // MULTIPROCESSOR_COUNT
    case 75:
      *value = capability / 10;
      break;  // COMPUTE_CAPABILITY_MAJOR
    case 76:
      *value = capability % 10;
      break;  // COMPUTE_CAPABILITY_MINOR
    case 81:
      *value = shared_per_processor;
      break;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 97:
      *value = shared_per_block;
      break;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    default:
      *value = 1;
  }
  return SUCCESS;
}
Result cuFuncGetAttribute(int* value, int attribute, Function* f) {
  switch (attribute) {
    case 0: {  // MAX_THREADS_PER_BLOCK
      int warps = 65536 / (int)registers_of_block(f, 32);
      *value = warps < 32 ? 32 * warps : 1024;
      break;
    }
    case 3:
      *value = f->local;
      break;  // LOCAL_SIZE_BYTES
    case 4:
      *value = f->registers;
      break;  // NUM_REGS
    default:
      *value = 0;
  }
  return SUCCESS;
}
Result cuFuncSetAttribute(Function* f, int attribute, int value) {
  if (attribute == 17) return INVALID_VALUE;  // SHARED_MEMORY_MODE: of drivers newer than this one
  if (attribute == 8) {                       // MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (value > shared_per_block) return refuse("shared memory asked for", value, shared_per_block);
    f->granted = value;
  }
  return SUCCESS;
}

static int context;
Result cuInit(unsigned flags) {
  (void)flags;
  return SUCCESS;
}
Result cuDriverGetVersion(int* v) {
  *v = 13000;
  return SUCCESS;
}
Result cuDeviceGetCount(int* n) {
  *n = 1;
  return SUCCESS;
}
Result cuDeviceGet(int* d, int i) {
  *d = i;
  return SUCCESS;
}
Result cuCtxGetCurrent(void** c) {
  *c = &context;
  return SUCCESS;
}
Result cuCtxSetCurrent(void* c) {
  (void)c;
  return SUCCESS;
}
Result cuCtxGetDevice(int* d) {
  *d = 0;
  return SUCCESS;
}
Result cuCtxGetLimit(size_t* v, int l) {
  (void)l;
  *v = 0;
  return SUCCESS;
}
Result cuCtxSetLimit(int l, size_t v) {
  (void)l, (void)v;
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void** c, int d) {
  (void)d;
  *c = &context;
  return SUCCESS;
}
Result cuGetErrorString(Result r, const char** s) {
  (void)r;
  *s = error;
  return SUCCESS;
}
Result cuModuleLoadData(void** m, const void* image) {
  *m = (void*)image;
  return SUCCESS;
}
Result cuModuleUnload(void* m) {
  (void)m;
  return SUCCESS;
}
Result cuFuncSetCacheConfig(Function* f, int c) {
  (void)f, (void)c;
  return SUCCESS;
}
Result cuOccupancyMaxActiveClusters(int* n, void* f, const void* c) {
  (void)f, (void)c;
  *n = 1;
  return SUCCESS;
}
Result cuPointerGetAttribute(void* d, int a, uint64_t p) {
  (void)a;
  memcpy(d, &p, 8);
  return SUCCESS;
}
Result cuStreamIsCapturing(void* s, int* status) {
  (void)s;
  *status = 0;
  return SUCCESS;
}
Result cuTensorMapEncodeTiled(void) {
  return INVALID_VALUE;
}
Result cuTensorMapEncodeIm2col(void) {
  return INVALID_VALUE;
}
