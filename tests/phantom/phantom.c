/* One H200 that is not there: the calls of the CUDA runtime and driver that torch makes outside its kernels.
 *
 * Loaded before torch (LD_PRELOAD), it makes torch.cuda.is_available() true. Device memory is memory of the host, copies
 * of up to a MiB are real, launches do nothing. So the host's side of torch runs as on the machine: autocast, the choice of attention
 * kernel, streams, events, pinned memory, the autograd engine. What tensors hold is undefined: keep them fake.
 *
 * phantom_count gives how often something happened: 0 launches, 1 waits (for a stream, an event or the device, and copies
 * that block), 2 copies.
 */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaGetDeviceProperties
#undef cuCtxGetCurrent
#undef cuDevicePrimaryCtxRetain

#define API __attribute__((visibility("default")))
#define RUNTIME(name, ...) API cudaError_t name(__VA_ARGS__)
#define DRIVER(name, ...) API CUresult name(__VA_ARGS__)

enum { LAUNCHES, WAITS, COPIES, COUNTERS };
static long counts[COUNTERS];
static void count(int which) { __atomic_fetch_add(&counts[which], 1, __ATOMIC_RELAXED); }
API long phantom_count(int which) { return which < COUNTERS ? counts[which] : -1; }

/* ---- memory: blocks of the host, remembered so that a pointer can be asked what it is */

static const size_t GIB = (size_t)1 << 30;
struct block { char *start; size_t size; enum cudaMemoryType type; struct block *next; };
static struct block *blocks;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(void *start, size_t size, enum cudaMemoryType type) {
  struct block *block = malloc(sizeof *block);
  *block = (struct block){start, size, type, NULL};
  pthread_mutex_lock(&lock);
  block->next = blocks;
  blocks = block;
  pthread_mutex_unlock(&lock);
}

static size_t forget(void *start) {
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (struct block **place = &blocks; *place; place = &(*place)->next)
    if ((*place)->start == start) {
      struct block *block = *place;
      *place = block->next;
      size = block->size;
      free(block);
      break;
    }
  pthread_mutex_unlock(&lock);
  return size;
}

static enum cudaMemoryType type_of(const void *pointer) {
  enum cudaMemoryType type = cudaMemoryTypeUnregistered;
  pthread_mutex_lock(&lock);
  for (struct block *block = blocks; block; block = block->next)
    if ((const char *)pointer >= block->start && (const char *)pointer < block->start + block->size) type = block->type;
  pthread_mutex_unlock(&lock);
  return type;
}

/* Pages that nobody writes to take no memory, however many are asked for */
static cudaError_t allocate(void **pointer, size_t size, enum cudaMemoryType type) {
  *pointer = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return cudaErrorMemoryAllocation;
  remember(*pointer, size ? size : 1, type);
  return cudaSuccess;
}

static cudaError_t release(void *pointer) {
  size_t size = pointer ? forget(pointer) : 0;
  if (size) munmap(pointer, size);
  return cudaSuccess;
}

RUNTIME(cudaMalloc, void **p, size_t n) { return allocate(p, n, cudaMemoryTypeDevice); }
RUNTIME(cudaFree, void *p) { return release(p); }
RUNTIME(cudaHostAlloc, void **p, size_t n, unsigned flags) { return allocate(p, n, cudaMemoryTypeHost); }
RUNTIME(cudaFreeHost, void *p) { return release(p); }
RUNTIME(cudaHostRegister, void *p, size_t n, unsigned flags) { return remember(p, n, cudaMemoryTypeHost), cudaSuccess; }
RUNTIME(cudaHostUnregister, void *p) { return forget(p), cudaSuccess; }
RUNTIME(cudaMemGetInfo, size_t *free_bytes, size_t *total) { return *free_bytes = 139 * GIB, *total = 141 * GIB, cudaSuccess; }

RUNTIME(cudaPointerGetAttributes, struct cudaPointerAttributes *attributes, const void *p) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = type_of(p);
  if (attributes->type != cudaMemoryTypeUnregistered) attributes->hostPointer = attributes->devicePointer = (void *)p;
  return cudaSuccess;
}

/* Small blocks hold what the host reads back, such as lengths; large ones would only take time and pages */
static const size_t SMALL = 1 << 20;
static cudaError_t copy(void *to, const void *from, size_t n) {
  count(COPIES);
  if (n <= SMALL) memmove(to, from, n);
  return cudaSuccess;
}
static cudaError_t set(void *p, int value, size_t n) {
  if (n <= SMALL) memset(p, value, n);
  return cudaSuccess;
}
RUNTIME(cudaMemcpy, void *to, const void *from, size_t n, enum cudaMemcpyKind kind) { return count(WAITS), copy(to, from, n); }
RUNTIME(cudaMemcpyAsync, void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) { return copy(to, from, n); }
RUNTIME(cudaMemset, void *p, int value, size_t n) { return set(p, value, n); }
RUNTIME(cudaMemsetAsync, void *p, int value, size_t n, cudaStream_t s) { return set(p, value, n); }

/* ---- the device */

RUNTIME(cudaGetDeviceCount, int *n) { return *n = 1, cudaSuccess; }
RUNTIME(cudaGetDevice, int *device) { return *device = 0, cudaSuccess; }
RUNTIME(cudaSetDevice, int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
RUNTIME(cudaDriverGetVersion, int *version) { return *version = CUDART_VERSION, cudaSuccess; }
RUNTIME(cudaRuntimeGetVersion, int *version) { return *version = CUDART_VERSION, cudaSuccess; }
RUNTIME(cudaDeviceGetPCIBusId, char *id, int n, int device) { return snprintf(id, n, "0000:00:00.0"), cudaSuccess; }
RUNTIME(cudaDeviceCanAccessPeer, int *can, int device, int peer) { return *can = 0, cudaSuccess; }
RUNTIME(cudaDeviceGetStreamPriorityRange, int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}

static cudaError_t properties(struct cudaDeviceProp *p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->totalGlobalMem = 141 * GIB;
  p->totalConstMem = 65536;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  for (int axis = 0; axis < 3; axis++) {
    p->maxThreadsDim[axis] = axis == 2 ? 64 : 1024;
    p->maxGridSize[axis] = axis ? 65535 : 2147483647;
  }
  p->l2CacheSize = 60 << 20;
  p->memoryBusWidth = 6144;
  p->textureAlignment = 512;
  p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
  p->asyncEngineCount = 3;
  return cudaSuccess;
}
RUNTIME(cudaGetDeviceProperties, struct cudaDeviceProp *p, int device) { return properties(p); }
RUNTIME(cudaGetDeviceProperties_v2, struct cudaDeviceProp *p, int device) { return properties(p); }

RUNTIME(cudaDeviceGetAttribute, int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 233472; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: *value = 65535; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

/* ---- streams and events: everything is done as soon as it is asked for */

RUNTIME(cudaDeviceSynchronize, void) { return count(WAITS), cudaSuccess; }
RUNTIME(cudaStreamCreate, cudaStream_t *s) { return *s = malloc(8), cudaSuccess; }
RUNTIME(cudaStreamCreateWithFlags, cudaStream_t *s, unsigned flags) { return *s = malloc(8), cudaSuccess; }
RUNTIME(cudaStreamCreateWithPriority, cudaStream_t *s, unsigned flags, int priority) { return *s = malloc(8), cudaSuccess; }
RUNTIME(cudaStreamGetPriority, cudaStream_t s, int *priority) { return *priority = 0, cudaSuccess; }
RUNTIME(cudaStreamDestroy, cudaStream_t s) { return free(s), cudaSuccess; }
RUNTIME(cudaStreamQuery, cudaStream_t s) { return cudaSuccess; }
RUNTIME(cudaStreamSynchronize, cudaStream_t s) { return count(WAITS), cudaSuccess; }
RUNTIME(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
RUNTIME(cudaStreamIsCapturing, cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
/* Later arguments differ between CUDA 12 and 13; none is needed when nothing is captured */
RUNTIME(phantom_capture_info, cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
__asm__(".globl cudaStreamGetCaptureInfo\n.set cudaStreamGetCaptureInfo, phantom_capture_info");
__asm__(".globl cudaStreamGetCaptureInfo_v2\n.set cudaStreamGetCaptureInfo_v2, phantom_capture_info");
__asm__(".globl cudaStreamGetCaptureInfo_v3\n.set cudaStreamGetCaptureInfo_v3, phantom_capture_info");
RUNTIME(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode) { return cudaSuccess; }
RUNTIME(cudaEventCreate, cudaEvent_t *event) { return *event = malloc(8), cudaSuccess; }
RUNTIME(cudaEventCreateWithFlags, cudaEvent_t *event, unsigned flags) { return *event = malloc(8), cudaSuccess; }
RUNTIME(cudaEventRecord, cudaEvent_t event, cudaStream_t s) { return cudaSuccess; }
RUNTIME(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t s, unsigned flags) { return cudaSuccess; }
RUNTIME(cudaEventQuery, cudaEvent_t event) { return cudaSuccess; }
RUNTIME(cudaEventSynchronize, cudaEvent_t event) { return count(WAITS), cudaSuccess; }
RUNTIME(cudaEventDestroy, cudaEvent_t event) { return free(event), cudaSuccess; }
RUNTIME(cudaEventElapsedTime, float *milliseconds, cudaEvent_t start, cudaEvent_t end) { return *milliseconds = 1, cudaSuccess; }
RUNTIME(cudaGetLastError, void) { return cudaSuccess; }
RUNTIME(cudaPeekAtLastError, void) { return cudaSuccess; }

/* ---- kernels */

RUNTIME(cudaLaunchKernel, const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
  return count(LAUNCHES), cudaSuccess;
}
RUNTIME(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *f, void **arguments) {
  return count(LAUNCHES), cudaSuccess;
}
/* How code of CUDA 13 launches */
RUNTIME(__cudaGetKernel, cudaKernel_t *kernel, const void *f) { return *kernel = (cudaKernel_t)f, cudaSuccess; }
RUNTIME(__cudaLaunchKernel, cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t s) {
  return count(LAUNCHES), cudaSuccess;
}
RUNTIME(cudaLaunchHostFunc, cudaStream_t s, cudaHostFn_t f, void *data) { return f(data), cudaSuccess; }
RUNTIME(cudaFuncSetAttribute, const void *f, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
RUNTIME(cudaFuncGetAttributes, struct cudaFuncAttributes *attributes, const void *f) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessor, int *n, const void *f, int threads, size_t shared) {
  return *n = 8, cudaSuccess;
}
RUNTIME(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, int *n, const void *f, int threads, size_t shared, unsigned flags) {
  return *n = 8, cudaSuccess;
}

/* ---- the driver, which torch asks for its context; compiled kernels are not loaded */

static const CUcontext CONTEXT = (CUcontext)8;
DRIVER(cuInit, unsigned flags) { return CUDA_SUCCESS; }
DRIVER(cuDriverGetVersion, int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
DRIVER(cuCtxGetCurrent, CUcontext *context) { return *context = CONTEXT, CUDA_SUCCESS; }
DRIVER(cuCtxSetCurrent, CUcontext context) { return CUDA_SUCCESS; }
DRIVER(cuDeviceGet, CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
DRIVER(cuDeviceGetCount, int *n) { return *n = 1, CUDA_SUCCESS; }
DRIVER(cuDeviceGetAttribute, int *value, CUdevice_attribute attribute, CUdevice device) {
  return (CUresult)cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
DRIVER(cuDevicePrimaryCtxGetState, CUdevice device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
DRIVER(cuDevicePrimaryCtxRetain, CUcontext *context, CUdevice device) { return *context = CONTEXT, CUDA_SUCCESS; }
DRIVER(cuGetErrorString, CUresult error, const char **text) { return *text = "phantom", CUDA_SUCCESS; }
DRIVER(cuPointerGetAttribute, void *data, CUpointer_attribute attribute, CUdeviceptr p) { return CUDA_ERROR_NOT_SUPPORTED; }

/* What torch's NVRTC library names of the driver, and does not call here */
#define ABSENT(name) __asm__(".globl " #name "\n.set " #name ", phantom_absent");
API CUresult phantom_absent(void) { return CUDA_ERROR_NOT_SUPPORTED; }
ABSENT(cuFuncGetAttribute) ABSENT(cuFuncSetAttribute) ABSENT(cuFuncSetCacheConfig) ABSENT(cuLaunchCooperativeKernel)
ABSENT(cuLaunchKernel) ABSENT(cuLinkAddData_v2) ABSENT(cuLinkComplete) ABSENT(cuLinkCreate_v2) ABSENT(cuModuleGetFunction)
ABSENT(cuModuleLoad) ABSENT(cuModuleLoadData) ABSENT(cuModuleLoadDataEx) ABSENT(cuModuleUnload)
ABSENT(cuOccupancyMaxActiveBlocksPerMultiprocessor) ABSENT(cuTensorMapEncodeTiled)
