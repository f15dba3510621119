/* A CUDA driver and runtime with one NVIDIA H200 in it that computes nothing.
 *
 * "Device" memory is mapped host memory, copies are memcpy, kernels are counted and skipped. That
 * is enough for torch's C++ (device properties, allocator, streams, capture and its rules, SDPA's
 * choice of a kernel) and for Triton's driver module, so that export, Inductor, ptxas and the
 * linker do their real work. One object serves as libcuda.so.1 and, preloaded, stands before
 * libcudart.
 *
 * REHEARSAL_GPU_LOG=1        say at exit how many kernels were launched (2, 3: more)
 * REHEARSAL_SKIP_COPIES=1    drop copies of more than 1 MiB, the weights (2: all but to the host)
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#undef cudaGetDeviceProperties

static int log_level(void) {
  static int v = -1;
  if (v < 0) {
    const char *e = getenv("REHEARSAL_GPU_LOG");
    v = e ? atoi(e) : 0;
  }
  return v;
}
static int skip_copies(void) {
  static int v = -1;
  if (v < 0) {
    const char *e = getenv("REHEARSAL_SKIP_COPIES");
    v = e ? atoi(e) : 0;
  }
  return v;
}
#define LOG(l, ...)                                                                                \
  do {                                                                                             \
    if (log_level() >= (l)) {                                                                      \
      fprintf(stderr, "[GPU that computes nothing] " __VA_ARGS__);                                 \
      fputc('\n', stderr);                                                                         \
    }                                                                                              \
  } while (0)
static unsigned long n_launch, n_drvlaunch, n_modules, n_mem;
__attribute__((destructor)) static void bye(void) {
  if (log_level() >= 1)
    fprintf(stderr,
            "[GPU that computes nothing] pid %d: %lu runtime launches, %lu driver launches, %lu "
            "modules, %lu allocations\n",
            getpid(), n_launch, n_drvlaunch, n_modules, n_mem);
}

/* ---------- memory ---------- */
struct range {
  char *base;
  size_t size;
  int host;
};
static struct range ranges[1 << 16];
static int n_ranges;
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static size_t total_mem = 150754820096ull, used_mem;
static void *take(size_t size, int host) {
  size_t s = (size + 4095) & ~4095ull;
  if (!s) s = 4096;
  void *p = mmap(NULL, s + (2 << 20), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return NULL;
  char *b = (char *)(((size_t)p + (2 << 20) - 1) &
                     ~((size_t)(2 << 20) - 1)); /* 2 MiB aligned, as cudaMalloc's big blocks */
  pthread_mutex_lock(&mu);
  ranges[n_ranges++] = (struct range){b, s, host};
  if (!host) used_mem += s;
  n_mem++;
  pthread_mutex_unlock(&mu);
  return b;
}
static struct range *find(const void *p) {
  for (int i = 0; i < n_ranges; i++)
    if ((char *)p >= ranges[i].base && (char *)p < ranges[i].base + ranges[i].size)
      return &ranges[i];
  return NULL;
}
static int give(void *p) {
  int ok = 1;
  pthread_mutex_lock(&mu);
  struct range *r = p ? find(p) : NULL;
  if (r) {
    munmap(r->base, r->size);
    if (!r->host) used_mem -= r->size;
    *r = ranges[--n_ranges];
  } else
    ok = 0;
  pthread_mutex_unlock(&mu);
  return ok;
}

/* ---------- capture state ---------- */
static int capturing;
static cudaStream_t capture_stream;
static __thread enum cudaStreamCaptureMode tmode = cudaStreamCaptureModeGlobal;
static cudaError_t last_error;
static cudaError_t err(cudaError_t e) {
  if (e) last_error = e;
  return e;
}
#define UNSAFE(name)                                                                               \
  do {                                                                                             \
    if (capturing && tmode != cudaStreamCaptureModeRelaxed) {                                      \
      LOG(0, "%s while a stream is being captured", name);                                         \
      return err(cudaErrorStreamCaptureUnsupported);                                               \
    }                                                                                              \
  } while (0)

/* ---------- the device ---------- */
static void fill(struct cudaDeviceProp *p) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = i + 1;
  p->totalGlobalMem = total_mem;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = 1024;
  p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = 65535;
  p->maxGridSize[2] = 65535;

  p->clockRate = 1980000;
  p->deviceOverlap = 1;
  p->memoryClockRate = 3201000;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->textureAlignment = 512;
  p->multiProcessorCount = 132;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  p->ECCEnabled = 1;
  p->pciBusID = 1;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = 1;
  p->memoryBusWidth = 6144;
  p->l2CacheSize = 62914560;
  p->persistingL2CacheMaxSize = 39321600;
  p->maxThreadsPerMultiProcessor = 2048;
  p->streamPrioritiesSupported = 1;
  p->globalL1CacheSupported = 1;
  p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->managedMemory = 1;
  p->pageableMemoryAccess = 0;
  p->concurrentManagedAccess = 1;
  p->computePreemptionSupported = 1;
  p->canUseHostPointerForRegisteredMem = 1;
  p->cooperativeLaunch = 1;
  p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32;
  p->accessPolicyMaxWindowSize = 134213632;
  p->reservedSharedMemPerBlock = 1024;
  p->hostRegisterSupported = 1;
  p->memoryPoolsSupported = 1;
  p->clusterLaunch = 1;
}
cudaError_t cudaGetDeviceProperties_v2(struct cudaDeviceProp *p, int d) {
  fill(p);
  return 0;
}
static int attribute(int a) {
  struct cudaDeviceProp p;
  fill(&p);
  switch (a) {
  case cudaDevAttrMaxThreadsPerBlock: return 1024;
  case cudaDevAttrMaxBlockDimX:
  case cudaDevAttrMaxBlockDimY: return 1024;
  case cudaDevAttrMaxBlockDimZ: return 64;
  case cudaDevAttrMaxGridDimX: return 2147483647;
  case cudaDevAttrMaxGridDimY:
  case cudaDevAttrMaxGridDimZ: return 65535;
  case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
  case cudaDevAttrTotalConstantMemory: return 65536;
  case cudaDevAttrWarpSize: return 32;
  case cudaDevAttrMaxRegistersPerBlock: return 65536;
  case cudaDevAttrClockRate: return 1980000;
  case cudaDevAttrMultiProcessorCount: return 132;
  case cudaDevAttrComputeCapabilityMajor: return 9;
  case cudaDevAttrComputeCapabilityMinor: return 0;
  case cudaDevAttrMemoryClockRate: return 3201000;
  case cudaDevAttrGlobalMemoryBusWidth: return p.memoryBusWidth;
  case cudaDevAttrL2CacheSize: return p.l2CacheSize;
  case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
  case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
  case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
  case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
  case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
  case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
  case cudaDevAttrCooperativeLaunch: return 1;
  case cudaDevAttrUnifiedAddressing:
  case cudaDevAttrConcurrentKernels:
  case cudaDevAttrCanMapHostMemory:
  case cudaDevAttrHostRegisterSupported:
  case cudaDevAttrMemoryPoolsSupported: return 1;
  case cudaDevAttrAsyncEngineCount: return 3;
  default: LOG(2, "attribute %d asked for: 0", a); return 0;
  }
}
cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr a, int d) {
  *v = attribute(a);
  return 0;
}
cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  return 0;
}
cudaError_t cudaGetDevice(int *d) {
  *d = 0;
  return 0;
}
cudaError_t cudaSetDevice(int d) { return d == 0 ? 0 : err(cudaErrorInvalidDevice); }
cudaError_t cudaDriverGetVersion(int *v) {
  *v = CUDA_VERSION;
  return 0;
}
cudaError_t cudaRuntimeGetVersion(int *v) {
  *v = CUDA_VERSION;
  return 0;
}
cudaError_t cudaDeviceSynchronize(void) {
  UNSAFE("cudaDeviceSynchronize");
  return 0;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *l, int *h) {
  *l = 0;
  *h = -5;
  return 0;
}
cudaError_t cudaDeviceCanAccessPeer(int *c, int a, int b) {
  *c = 0;
  return 0;
}
cudaError_t cudaDeviceGetPCIBusId(char *s, int n, int d) {
  snprintf(s, n, "0000:01:00.0");
  return 0;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int d) {
  *p = (void *)0x77;
  return 0;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t p, enum cudaMemPoolAttr a, void *v) {
  *(unsigned long long *)v = 0;
  return 0;
}
cudaError_t cudaMemGetInfo(size_t *f, size_t *t) {
  *t = total_mem;
  *f = total_mem - used_mem - (600ull << 20);
  return 0;
}
cudaError_t cudaGetLastError(void) {
  cudaError_t e = last_error;
  last_error = 0;
  return e;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorString(cudaError_t e) { return e ? "refused by the rehearsal" : "no error"; }

cudaError_t cudaMalloc(void **p, size_t n) {
  UNSAFE("cudaMalloc");
  if (used_mem + n > total_mem) return err(cudaErrorMemoryAllocation);
  *p = take(n, 0);
  return *p ? 0 : err(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void **p, size_t n, cudaStream_t s) {
  *p = take(n, 0);
  return *p ? 0 : err(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void *p) {
  UNSAFE("cudaFree");
  if (p) give(p);
  return 0;
}
cudaError_t cudaFreeAsync(void *p, cudaStream_t s) {
  give(p);
  return 0;
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned f) {
  UNSAFE("cudaHostAlloc");
  *p = take(n, 1);
  return *p ? 0 : err(cudaErrorMemoryAllocation);
}
cudaError_t cudaFreeHost(void *p) {
  give(p);
  return 0;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  pthread_mutex_lock(&mu);
  struct range *r = find(p);
  pthread_mutex_unlock(&mu);
  if (!r) {
    a->type = cudaMemoryTypeUnregistered;
    a->device = -2;
    a->hostPointer = (void *)p;
    return 0;
  }
  a->type = r->host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  a->devicePointer = (void *)p;
  a->hostPointer = r->host ? (void *)p : NULL;
  return 0;
}
static cudaError_t copy(void *d, const void *s, size_t n, int k) {
  if (skip_copies() > 1 && k != cudaMemcpyDeviceToHost && k != cudaMemcpyHostToHost) return 0;
  if (n > (1 << 20) && skip_copies()) {
    LOG(3, "skipped a copy of %zu bytes", n);
    return 0;
  }
  memmove(d, s, n);
  return 0;
}
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, enum cudaMemcpyKind k) {
  UNSAFE("cudaMemcpy");
  return copy(d, s, n, k);
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, enum cudaMemcpyKind k,
                            cudaStream_t st) {
  if (capturing) return 0;
  return copy(d, s, n, k);
}
cudaError_t cudaMemcpyPeerAsync(void *d, int a, const void *s, int b, size_t n, cudaStream_t st) {
  return copy(d, s, n, cudaMemcpyDeviceToDevice);
}
cudaError_t cudaMemset(void *d, int v, size_t n) {
  if (v || n < (1 << 20)) memset(d, v, n);
  return 0;
}
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t s) {
  if (!capturing && (v || n < (1 << 20))) memset(d, v, n);
  return 0;
}

/* ---------- streams, events, graphs ---------- */
static long next_handle = 0x1000;
static void *handle(void) { return (void *)(__sync_add_and_fetch(&next_handle, 16)); }
cudaError_t cudaStreamCreate(cudaStream_t *s) {
  *s = handle();
  return 0;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned f, int p) {
  *s = handle();
  return 0;
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *p) {
  *p = 0;
  return 0;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  if (capturing && s == capture_stream) {
    LOG(0, "cudaStreamSynchronize of the captured stream");
    return err(cudaErrorStreamCaptureUnsupported);
  }
  UNSAFE("cudaStreamSynchronize");
  return 0;
}
cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t c, void *u, unsigned f) {
  c(s, 0, u);
  return 0;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void *u) {
  f(u);
  return 0;
}
cudaError_t cudaEventCreate(cudaEvent_t *e) {
  *e = handle();
  return 0;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned f) {
  *e = handle();
  return 0;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  UNSAFE("cudaEventSynchronize");
  return 0;
}
/* Different times for different candidates, the same in every process that asks in the same order:
 * an autotuner has winners, and they are not the defaults. */
cudaError_t cudaEventElapsedTime(float *t, cudaEvent_t a, cudaEvent_t b) {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  *t = 1.0f + (float)(state >> 8) / (1 << 26);
  return 0;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) {
  if (!s) return err(cudaErrorStreamCaptureUnsupported);
  capturing = 1;
  capture_stream = s;
  LOG(1, "capture begins");
  return 0;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
  capturing = 0;
  *g = handle();
  LOG(1, "capture ends");
  return 0;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *c) {
  *c = (capturing && s == capture_stream) ? cudaStreamCaptureStatusActive
                                          : cudaStreamCaptureStatusNone;
  return 0;
}
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t s, enum cudaStreamCaptureStatus *c,
                                        unsigned long long *id, cudaGraph_t *g,
                                        const cudaGraphNode_t **d, size_t *n) {
  cudaStreamIsCapturing(s, c);
  if (id) *id = 7;
  if (g) *g = (void *)0x70;
  if (d) *d = NULL;
  if (n) *n = 0;
  return 0;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *m) {
  enum cudaStreamCaptureMode o = tmode;
  tmode = *m;
  *m = o;
  return 0;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) {
  *e = handle();
  return 0;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long f) {
  *e = handle();
  return 0;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *n, size_t *c) {
  *c = 1;
  return 0;
}
cudaError_t cudaGraphAddEmptyNode(cudaGraphNode_t *n, cudaGraph_t g, const cudaGraphNode_t *d,
                                  size_t c) {
  *n = handle();
  return 0;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t n, cudaGraphNode_t *d, size_t *c) {
  *c = 0;
  return 0;
}
cudaError_t cudaGraphNodeGetType(cudaGraphNode_t n, enum cudaGraphNodeType *t) {
  *t = cudaGraphNodeTypeKernel;
  return 0;
}
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *h, void *p) { return cudaErrorNotSupported; }
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t h, unsigned f) {
  return cudaErrorNotSupported;
}
cudaError_t cudaIpcCloseMemHandle(void *p) { return cudaErrorNotSupported; }
cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *h, cudaEvent_t e) {
  return cudaErrorNotSupported;
}
cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *e, cudaIpcEventHandle_t h) {
  return cudaErrorNotSupported;
}

/* ---------- kernels ---------- */
static __thread struct {
  dim3 g, b;
  size_t sh;
  void *st;
} conf[16];
static __thread int n_conf;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, void *st) {
  if (n_conf < 16) {
    conf[n_conf].g = g;
    conf[n_conf].b = b;
    conf[n_conf].sh = sh;
    conf[n_conf].st = st;
    n_conf++;
  }
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *sh, void *st) {
  if (n_conf) {
    n_conf--;
    *g = conf[n_conf].g;
    *b = conf[n_conf].b;
    *sh = conf[n_conf].sh;
    *(void **)st = conf[n_conf].st;
  }
  return 0;
}
cudaError_t cudaLaunchKernel(const void *f, dim3 g, dim3 b, void **a, size_t sh, cudaStream_t s) {
  n_launch++;
  if (!g.x || !g.y || !g.z) {
    LOG(0, "launch with an empty grid");
    return err(cudaErrorInvalidConfiguration);
  }
  return 0;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **a) {
  n_launch++;
  return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = 90;
  a->ptxVersion = 90;
  a->maxDynamicSharedSizeBytes = 232448;
  return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b,
                                                                   size_t s, unsigned fl) {
  *n = 2;
  return 0;
}
cudaError_t cudaGetDriverEntryPoint(const char *s, void **p, unsigned long long f,
                                    enum cudaDriverEntryPointQueryResult *r) {
  *p = dlsym(RTLD_DEFAULT, s);
  LOG(2, "entry point %s: %s", s, *p ? "ok" : "none");
  if (r) *r = *p ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *s, void **p, unsigned v,
                                             unsigned long long f,
                                             enum cudaDriverEntryPointQueryResult *r) {
  return cudaGetDriverEntryPoint(s, p, f, r);
}

/* ---------- driver API: what Triton's module, AOTInductor's library and torch ask for ----------
 */
struct module {
  char *image;
  int regs, spills, shared;
};
CUresult cuDriverGetVersion(int *v) {
  *v = CUDA_VERSION;
  return 0;
}
CUresult cuDeviceGet(CUdevice *d, int i) {
  *d = 0;
  return 0;
}
CUresult cuDeviceGetCount(int *n) {
  *n = 1;
  return 0;
}
CUresult cuDeviceGetName(char *s, int n, CUdevice d) {
  snprintf(s, n, "NVIDIA H200");
  return 0;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = attribute((int)a);
  return 0;
}
CUresult cuDeviceTotalMem_v2(size_t *n, CUdevice d) {
  *n = total_mem;
  return 0;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *a) {
  if (f) *f = 0;
  *a = 1;
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  *c = (void *)0x99;
  return 0;
}
CUresult cuCtxGetCurrent(CUcontext *c) {
  *c = (void *)0x99;
  return 0;
}
CUresult cuCtxGetDevice(CUdevice *d) {
  *d = 0;
  return 0;
}
CUresult cuCtxPopCurrent_v2(CUcontext *c) {
  if (c) *c = (void *)0x99;
  return 0;
}
CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
  *v = 1 << 20;
  return 0;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *a, void **d, CUdeviceptr p) {
  for (unsigned i = 0; i < n; i++) {
    CUresult r = cuPointerGetAttribute(d[i], a[i], p);
    if (r) return r;
  }
  return 0;
}
CUresult cuGetErrorString(CUresult e, const char **s) {
  *s = "an error of the GPU that computes nothing";
  return 0;
}
CUresult cuGetErrorName(CUresult e, const char **s) {
  *s = "REHEARSAL";
  return 0;
}
/* A Triton cubin carries its registers and stack in .nv.info; REGCOUNT is attribute 0x2f
 * (index,count), FRAME_SIZE 0x11. */
static void scan(const unsigned char *e,
                 struct module *m) { /* ELF64: walk the section headers for .nv.info */
  if (memcmp(e, "\177ELF", 4)) return;
  unsigned long shoff = *(unsigned long *)(e + 40);
  unsigned short sz = *(unsigned short *)(e + 58), n = *(unsigned short *)(e + 60),
                 si = *(unsigned short *)(e + 62);
  const unsigned char *str = e + *(unsigned long *)(e + shoff + si * sz + 24);
  unsigned arch = (*(unsigned *)(e + 48) >> 8) & 0xff, arch0 = *(unsigned *)(e + 48) & 0xff;
  LOG(3, "cubin e_flags arch %u/%u", arch, arch0);
  for (int i = 0; i < n; i++) {
    const unsigned char *h = e + shoff + i * sz;
    const char *name = (const char *)str + *(unsigned *)h;
    const unsigned char *d = e + *(unsigned long *)(h + 24);
    unsigned long len = *(unsigned long *)(h + 32);
    if (strcmp(name, ".nv.info")) continue;
    for (unsigned long o = 0; o + 4 <= len;) {
      unsigned fmt = d[o], at = d[o + 1];
      unsigned short s = *(unsigned short *)(d + o + 2);
      if (fmt == 4) {
        if (at == 0x2f) m->regs = *(int *)(d + o + 8);
        if (at == 0x23) m->spills = *(int *)(d + o + 8);
        o += 4 + s;
      } else
        o += 4;
    }
  }
}
CUresult cuModuleLoadData(CUmodule *m, const void *i) {
  UNSAFE("cuModuleLoadData");
  struct module *x = calloc(1, sizeof *x);
  scan(i, x);
  n_modules++;
  *m = (void *)x;
  LOG(2, "module: %d registers, %d bytes of stack", x->regs, x->spills);
  return 0;
}
CUresult cuModuleLoad(CUmodule *m, const char *p) {
  UNSAFE("cuModuleLoad");
  FILE *f = fopen(p, "rb");
  if (!f) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(f, 0, SEEK_END);
  long n = ftell(f);
  rewind(f);
  char *b = malloc(n);
  if (fread(b, 1, n, f) != (size_t)n) {}
  fclose(f);
  CUresult r = cuModuleLoadData(m, b);
  free(b);
  return r;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) {
  *f = (void *)m;
  return 0;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  struct module *m = (void *)f;
  switch (a) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *v = m->regs; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *v = m->spills; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = 1024; break;
  default: *v = 0;
  }
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v > 232448)
    return CUDA_ERROR_INVALID_VALUE;
  return 0;
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned sh, CUstream s, void **a, void **e) {
  n_drvlaunch++;
  if (!gx || !gy || !gz) {
    LOG(0, "cuLaunchKernel with an empty grid");
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (gy > 65535 || gz > 65535) {
    LOG(0, "grid %u %u %u is too big", gx, gy, gz);
    return CUDA_ERROR_INVALID_VALUE;
  }
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **a, void **e) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, 1, 1, 1, 0, 0, a, e);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                   unsigned by, unsigned bz, unsigned sh, CUstream s, void **a) {
  n_drvlaunch++;
  return 0;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) {
  *n = 2;
  return 0;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 66;
  return 0;
}
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
  struct range *r = find((void *)p);
  if (!r) return CUDA_ERROR_INVALID_VALUE;
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr *)v = p;
  else if (a == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *(unsigned *)v = 2;
  else
    *(int *)v = 0;
  return 0;
}
CUresult cuMemcpyDtoHAsync_v2(void *d, CUdeviceptr s, size_t n, CUstream st) {
  memcpy(d, (void *)s, n);
  return 0;
}
CUresult cuGetProcAddress_v2(const char *s, void **p, int v, cuuint64_t f,
                             CUdriverProcAddressQueryResult *r) {
  *p = dlsym(RTLD_DEFAULT, s);
  LOG(2, "proc %s: %s", s, *p ? "ok" : "none");
  if (r) *r = *p ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *p ? 0 : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetExportTable(const void **t, const CUuuid *u) {
  LOG(1, "cuGetExportTable: a library with its own CUDA runtime asks; refused");
  return CUDA_ERROR_NOT_FOUND;
}
