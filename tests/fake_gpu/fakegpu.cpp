// A CUDA 13 runtime, driver and cuBLAS without a GPU: memory is host address space, kernels do nothing, every call is logged and checked.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cublas_v2.h>
#include <cublasLt.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <map>
#include <unordered_map>
#include <vector>
#include <mutex>
#include <time.h>
#include <cxxabi.h>
#define API extern "C" __attribute__((visibility("default")))
typedef std::lock_guard<std::mutex> Lock;
static std::mutex mu;
static int MAJOR = 9, MINOR = 0, SMS = 132, SHARED_OPTIN = 232448, NDEV = 1;
static const char* NAME = "NVIDIA H200";
static size_t TOTAL = 141ull << 30;
static size_t L2 = 60u << 20;
static thread_local int cur_dev = 0;
static thread_local cudaStreamCaptureMode cap_mode = cudaStreamCaptureModeGlobal;
static thread_local cudaError_t last_error = cudaSuccess;
static bool logging = false, verbose = false;
static std::vector<std::string> logs;
static void note(const std::string& s) {
  if (logging) {
    Lock l(mu);
    logs.push_back(s);
  }
  if (verbose) fprintf(stderr, "[fakegpu] %s\n", s.c_str());
}
static void init() __attribute__((constructor));
static void init() {
  const char* part = getenv("FAKEGPU_PART");
  if (part && !strcmp(part, "sm_80")) {
    MAJOR = 8;
    MINOR = 0;
    SMS = 108;
    SHARED_OPTIN = 166912;
    NAME = "NVIDIA A100-SXM4-80GB";
    TOTAL = 80ull << 30;
    L2 = 40u << 20;
  }
  if (part && !strcmp(part, "sm_89")) {
    MAJOR = 8;
    MINOR = 9;
    SMS = 128;
    SHARED_OPTIN = 101376;
    NAME = "NVIDIA GeForce RTX 4090";
    TOTAL = 24ull << 30;
    L2 = 72u << 20;
  }
  if (getenv("FAKEGPU_DEVICES")) NDEV = atoi(getenv("FAKEGPU_DEVICES"));
  verbose = getenv("FAKEGPU_VERBOSE") != nullptr;
}
API void fg_start() {
  Lock l(mu);
  logs.clear();
  logging = true;
}
API void fg_stop() { logging = false; }
API void fg_dump(const char* path) {
  Lock l(mu);
  FILE* f = fopen(path, "w");
  for (auto& s : logs) fprintf(f, "%s\n", s.c_str());
  fclose(f);
}
// ---------------- memory
static char* arena = nullptr;
static size_t arena_at = 0;
static const size_t ARENA = 8ull << 40;
struct Block {
  size_t size;
  int dev;
};
static std::map<char*, Block> blocks;
static std::map<char*, size_t> pinned;
static size_t used[16];
static bool in_arena(const void* p) { return arena && (char*)p >= arena && (char*)p < arena + ARENA; }
static bool capturing_any();
static cudaError_t fail(cudaError_t e) {
  last_error = e;
  return e;
}
static cudaError_t alloc(void** p, size_t n) {
  Lock l(mu);
  if (!arena) {
    arena = (char*)mmap(nullptr, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) {
      perror("arena");
      abort();
    }
  }
  size_t r = (n + (2u << 20) - 1) & ~(size_t)((2u << 20) - 1);
  if (used[cur_dev] + r > TOTAL - (600u << 20)) return fail(cudaErrorMemoryAllocation);
  *p = arena + arena_at;
  arena_at += r;
  used[cur_dev] += r;
  blocks[(char*)*p] = {r, cur_dev};
  return cudaSuccess;
}
static cudaError_t dealloc(void* p) {
  if (!p) return cudaSuccess;
  Lock l(mu);
  auto i = blocks.find((char*)p);
  if (i == blocks.end()) {
    fprintf(stderr, "[fakegpu] free of unknown pointer\n");
    return fail(cudaErrorInvalidValue);
  }
  used[i->second.dev] -= i->second.size;
  madvise(p, i->second.size, MADV_DONTNEED);
  blocks.erase(i);
  return cudaSuccess;
}
// ---------------- streams and capture
struct Stream {
  bool capturing = false;
  unsigned long long id = 0;
  int dev = 0;
};
static std::map<void*, Stream> streams;
static unsigned long long capture_ids = 0;
static int captures = 0;
static bool capturing_any() { return captures > 0; }
static cudaError_t sync_call(const char* what, cudaStream_t s, bool whole = false) {
  bool bad;
  {
    Lock l(mu);
    bad = whole ? captures > 0 : (streams.count(s) && streams[s].capturing);
  }
  note(std::string("SYNC ") + what);
  if (bad) {
    note(std::string("CAPTURE-VIOLATION ") + what);
    fprintf(stderr, "[fakegpu] %s during capture\n", what);
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
API cudaError_t cudaMalloc(void** p, size_t n) {
  if (capturing_any() && cap_mode == cudaStreamCaptureModeGlobal) {
    note("CAPTURE-VIOLATION cudaMalloc");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  note("cudaMalloc");
  return alloc(p, n);
}
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return alloc(p, n); }
API cudaError_t cudaFree(void* p) {
  note("cudaFree");
  return dealloc(p);
}
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return dealloc(p); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) {
  note("cudaHostAlloc");
  if (capturing_any() && cap_mode == cudaStreamCaptureModeGlobal) {
    note("CAPTURE-VIOLATION cudaHostAlloc");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  *p = aligned_alloc(4096, (n + 4095) & ~4095ull);
  Lock l(mu);
  pinned[(char*)*p] = n;
  return cudaSuccess;
}
API cudaError_t cudaFreeHost(void* p) {
  {
    Lock l(mu);
    pinned.erase((char*)p);
  }
  free(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  Lock l(mu);
  pinned[(char*)p] = n;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  Lock l(mu);
  pinned.erase((char*)p);
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  Lock l(mu);
  if (in_arena(p)) {
    a->type = cudaMemoryTypeDevice;
    auto i = blocks.upper_bound((char*)p);
    if (i != blocks.begin()) {
      --i;
      a->device = i->second.dev;
    }
    a->devicePointer = (void*)p;
    return cudaSuccess;
  }
  auto i = pinned.upper_bound((char*)p);
  if (i != pinned.begin()) {
    --i;
    if ((char*)p < i->first + i->second) {
      a->type = cudaMemoryTypeHost;
      a->hostPointer = (void*)p;
      a->devicePointer = (void*)p;
      return cudaSuccess;
    }
  }
  a->type = cudaMemoryTypeUnregistered;
  a->device = -2;
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *t = TOTAL;
  *f = TOTAL - used[cur_dev];
  return cudaSuccess;
}
static bool is_pinned(const void* p) {
  cudaPointerAttributes a;
  cudaPointerGetAttributes(&a, p);
  return a.type == cudaMemoryTypeHost;
}
static void copy(void* d, const void* s, size_t n) {
  if (n <= (16u << 20)) memmove(d, s, n);
}
static const char* kindname(const void* d, const void* s) {
  bool dd = in_arena(d), sd = in_arena(s);
  return dd ? (sd ? "D2D" : "H2D") : (sd ? "D2H" : "H2H");
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) {
  if (auto e = sync_call("cudaMemcpy", 0, true)) return e;
  copy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t st) {
  const char* k = kindname(d, s);
  bool pg = (!strcmp(k, "H2D") && !is_pinned(s)) || (!strcmp(k, "D2H") && !is_pinned(d));
  note(std::string("MEMCPY ") + k + (pg ? " pageable " : " ") + std::to_string(n));
  if (pg) {
    Lock l(mu);
    if (streams.count(st) && streams[st].capturing) {
      logs.push_back("CAPTURE-VIOLATION pageable copy");
      fprintf(stderr, "[fakegpu] pageable copy during capture\n");
    }
  }
  copy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) {
  note("MEMCPY P2P");
  copy(d, s, n);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }
API cudaError_t cudaMemset(void* d, int v, size_t n) {
  if (n <= (1u << 20)) memset(d, v, n);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) {
  note("MEMSET " + std::to_string(n));
  if (n <= (1u << 20)) memset(d, v, n);
  return cudaSuccess;
}
API cudaError_t cudaStreamCreate(cudaStream_t* s) {
  Lock l(mu);
  *s = (cudaStream_t)malloc(64);
  streams[*s] = {false, 0, cur_dev};
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t s) { return cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t, int* p) {
  *p = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) {
  *a = 0;
  *b = -5;
  return cudaSuccess;
}
API cudaError_t cudaStreamSynchronize(cudaStream_t s) { return sync_call("cudaStreamSynchronize", s); }
API cudaError_t cudaDeviceSynchronize() { return sync_call("cudaDeviceSynchronize", 0, true); }
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaStreamAddCallback(cudaStream_t, cudaStreamCallback_t, void*, unsigned) { return cudaSuccess; }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* d) {
  f(d);
  return cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
  note("BEGIN CAPTURE");
  Lock l(mu);
  if (!s) { return fail(cudaErrorStreamCaptureUnsupported); }
  streams[s].capturing = true;
  streams[s].id = ++capture_ids;
  captures++;
  return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) {
  note("END CAPTURE");
  Lock l(mu);
  streams[s].capturing = false;
  captures--;
  *g = (cudaGraph_t)malloc(64);
  return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* st) {
  Lock l(mu);
  *st = streams.count(s) && streams[s].capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* st, unsigned long long* id, cudaGraph_t* g,
                                         const cudaGraphNode_t** d, const cudaGraphEdgeData** e, size_t* n) {
  Lock l(mu);
  bool c = streams.count(s) && streams[s].capturing;
  *st = c ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = c ? streams[s].id : 0;
  if (g) *g = (cudaGraph_t)1;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  std::swap(*m, cap_mode);
  return cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t, unsigned long long) {
  *e = (cudaGraphExec_t)malloc(64);
  return cudaSuccess;
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  note("GRAPH LAUNCH");
  return cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
API cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* n) {
  *n = 1;
  return cudaSuccess;
}
API cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
// ---------------- events
struct Ev {
  double t;
};
static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) {
  *e = (cudaEvent_t) new Ev{0};
  return cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  delete (Ev*)e;
  return cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  ((Ev*)e)->t = now();
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t) {
  if (capturing_any() && cap_mode == cudaStreamCaptureModeGlobal) { note("CAPTURE-VIOLATION cudaEventQuery"); }
  return cudaSuccess;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  note("SYNC cudaEventSynchronize");
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (float)(((Ev*)b)->t - ((Ev*)a)->t);
  if (*ms < 1e-3f) *ms = 1e-3f;
  return cudaSuccess;
}
// ---------------- devices
API cudaError_t cudaGetDeviceCount(int* n) {
  *n = NDEV;
  return cudaSuccess;
}
API cudaError_t cudaGetDevice(int* d) {
  *d = cur_dev;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int d) {
  if (d >= NDEV) return fail(cudaErrorInvalidDevice);
  cur_dev = d;
  return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() {
  auto e = last_error;
  last_error = cudaSuccess;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(cudaError_t e) { return "cudaErrorFake"; }
API const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorMemoryAllocation           ? "out of memory"
         : e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing"
         : e == cudaErrorInvalidConfiguration     ? "invalid configuration argument"
                                                  : "fake error";
}
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, NAME);
  p->totalGlobalMem = TOTAL;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->memPitch = 1ull << 31;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = MAJOR;
  p->minor = MINOR;
  p->multiProcessorCount = SMS;
  p->l2CacheSize = L2;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = SHARED_OPTIN + 1024;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->unifiedAddressing = 1;
  p->concurrentKernels = 1;
  p->managedMemory = 1;
  p->pciBusID = d + 1;
  p->canMapHostMemory = 1;
  p->memoryBusWidth = 6144;
  p->maxBlocksPerMultiProcessor = 32;
  return cudaSuccess;
}
static int attribute(int a, int* v) {
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *v = 65536;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = SMS;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = MAJOR;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = MINOR;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = SHARED_OPTIN;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = SHARED_OPTIN + 1024;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = 2048;
      break;
    case cudaDevAttrClockRate:
      *v = 1980000;
      break;
    case cudaDevAttrMemoryClockRate:
      *v = 3201000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *v = 6144;
      break;
    case cudaDevAttrL2CacheSize:
      *v = L2;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = 32;
      break;
    case cudaDevAttrUnifiedAddressing:
      *v = 1;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    default:
      *v = 0;
  }
  return 0;
}
API cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  attribute(a, v);
  return cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int* v, int, int) {
  *v = 0;
  return cudaSuccess;
}
API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) {
  snprintf(s, n, "0000:%02x:00.0", d + 1);
  return cudaSuccess;
}
API cudaError_t cudaProfilerStart() { return cudaSuccess; }
API cudaError_t cudaProfilerStop() { return cudaSuccess; }
// ---------------- kernels
static std::unordered_map<const void*, std::string> names;
static std::string pretty(const char* n) {
  int st;
  char* d = abi::__cxa_demangle(n, 0, 0, &st);
  std::string s = d ? d : n;
  free(d);
  return s.substr(0, 220);
}
API void** __cudaRegisterFatBinary(void*) {
  static void* h;
  return &h;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterFunction(void**, const char* f, char*, const char* name, int, void*, void*, void*, void*, int*) { names[f] = name; }
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
struct Conf {
  dim3 g, b;
  size_t s;
  cudaStream_t st;
};
static thread_local std::vector<Conf> confs;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, cudaStream_t st) {
  confs.push_back({g, b, s, st});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) {
  Conf c = confs.back();
  confs.pop_back();
  *g = c.g;
  *b = c.b;
  *s = c.s;
  *(cudaStream_t*)st = c.st;
  return cudaSuccess;
}
static cudaError_t launched(const char* kind, const std::string& n, dim3 g, dim3 b, size_t s) {
  if (g.y > 65535 || g.z > 65535 || !g.x || !g.y || !g.z || g.x > 2147483647u || b.x * b.y * b.z > 1024) {
    note("BAD-LAUNCH " + n);
    fprintf(stderr, "[fakegpu] bad launch %s grid %u %u %u block %u\n", n.c_str(), g.x, g.y, g.z, b.x * b.y * b.z);
    return fail(cudaErrorInvalidConfiguration);
  }
  if (logging || verbose) {
    char buf[96];
    snprintf(buf, sizeof buf, " grid %u,%u,%u block %u shared %zu", g.x, g.y, g.z, b.x * b.y * b.z, s);
    note(std::string(kind) + " " + n + buf);
  }
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void**, size_t s, cudaStream_t) {
  return launched("KERNEL", logging ? pretty(names[f].c_str()) : "", g, b, s);
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 g, dim3 b, void**, size_t s, cudaStream_t) {
  return launched("KERNEL", logging ? pretty(names[f].c_str()) : "", g, b, s);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  return launched("KERNEL", logging ? pretty(names[f].c_str()) : "", c->gridDim, c->blockDim, c->dynamicSmemBytes);
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 64;
  a->binaryVersion = MAJOR * 10 + MINOR;
  a->ptxVersion = a->binaryVersion;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolAddress(void** p, const void*) { return alloc(p, 1 << 20); }
// ---------------- cuBLAS
static char* type_name(int t) {
  static char b[8][8];
  static int i;
  char* s = b[i = (i + 1) % 8];
  const char* n = t == CUDA_R_16BF ? "bf16" : t == CUDA_R_16F ? "fp16" : t == CUDA_R_32F ? "fp32" : t == CUDA_R_64F ? "fp64" : "?";
  strcpy(s, n);
  return s;
}
static void gemm(const char* w, int ta, int tb, long m, long n, long k, const void* A, int at, long lda, const void* B, int bt, long ldb,
                 const void* C, int ct, long ldc, const void* beta, int compute, int batch) {
  char buf[320];
  float be = beta && !in_arena(beta) ? *(const float*)beta : -1;
  auto al = [](const void* p) {
    unsigned long long x = (unsigned long long)p;
    int a = 256;
    while (x % a) a /= 2;
    return a;
  };
  snprintf(buf, sizeof buf, "GEMM %s %c%c m%ld n%ld k%ld lda%ld ldb%ld ldc%ld %s,%s->%s beta%g align %d,%d,%d batch %d compute %d", w,
           ta ? 'T' : 'N', tb ? 'T' : 'N', m, n, k, lda, ldb, ldc, type_name(at), type_name(bt), type_name(ct), be, al(A), al(B), al(C),
           batch, compute);
  note(buf);
}
API cublasStatus_t cublasCreate_v2(cublasHandle_t* h) {
  *h = (cublasHandle_t)calloc(1, 4096);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDestroy_v2(cublasHandle_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
static int math_mode = 0;
API cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t m) {
  math_mode = m;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* m) {
  *m = (cublasMath_t)math_mode;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t, cublasPointerMode_t) { return CUBLAS_STATUS_SUCCESS; }
API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* m) {
  *m = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void*, const void* A,
                                cudaDataType at, int lda, const void* B, cudaDataType bt, int ldb, const void* beta, void* C,
                                cudaDataType ct, int ldc, cublasComputeType_t c, cublasGemmAlgo_t) {
  if (lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) {
    note("BAD-GEMM");
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  gemm("Ex", ta, tb, m, n, k, A, at, lda, B, bt, ldb, C, ct, ldc, beta, c, 1);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const void*,
                                              const void* A, cudaDataType at, int lda, long long, const void* B, cudaDataType bt, int ldb,
                                              long long, const void* beta, void* C, cudaDataType ct, int ldc, long long, int batch,
                                              cublasComputeType_t c, cublasGemmAlgo_t) {
  gemm("BatchedEx", ta, tb, m, n, k, A, at, lda, B, bt, ldb, C, ct, ldc, beta, c, batch);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemm_v2(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float*,
                                  const float* A, int lda, const float* B, int ldb, const float* beta, float* C, int ldc) {
  gemm("S", ta, tb, m, n, k, A, CUDA_R_32F, lda, B, CUDA_R_32F, ldb, C, CUDA_R_32F, ldc, beta, 0, 1);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDgemm_v2(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const double*,
                                  const double* A, int lda, const double* B, int ldb, const double* beta, double* C, int ldc) {
  gemm("D", ta, tb, m, n, k, A, CUDA_R_64F, lda, B, CUDA_R_64F, ldb, C, CUDA_R_64F, ldc, nullptr, 0, 1);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float*,
                                             const float* A, int lda, long long, const float* B, int ldb, long long, const float* beta,
                                             float* C, int ldc, long long, int batch) {
  gemm("SBatched", ta, tb, m, n, k, A, CUDA_R_32F, lda, B, CUDA_R_32F, ldb, C, CUDA_R_32F, ldc, beta, 0, batch);
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDgemmStridedBatched(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const double*,
                                             const double*, int, long long, const double*, int, long long, const double*, double*, int,
                                             long long, int) {
  note("GEMM DBatched");
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSgemv_v2(cublasHandle_t, cublasOperation_t, int m, int n, const float*, const float*, int, const float*, int,
                                  const float*, float*, int) {
  note("GEMV S " + std::to_string(m) + "x" + std::to_string(n));
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasSdot_v2(cublasHandle_t, int n, const float*, int, const float*, int, float*) {
  note("DOT S " + std::to_string(n));
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasDotEx(cublasHandle_t, int n, const void*, cudaDataType, int, const void*, cudaDataType, int, void*, cudaDataType,
                               cudaDataType) {
  note("DOT Ex " + std::to_string(n));
  return CUBLAS_STATUS_SUCCESS;
}
API size_t cublasLtGetVersion() { return 130100; }
API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                  cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int,
                                                  cublasLtMatmulHeuristicResult_t* r, int* n) {
  memset(r, 0, sizeof *r);
  *n = 1;
  return CUBLAS_STATUS_SUCCESS;
}
API cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t, const void*,
                                  cublasLtMatrixLayout_t, const void*, const void* C, cublasLtMatrixLayout_t, void* D,
                                  cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*, void*, size_t, cudaStream_t) {
  note(std::string("GEMM Lt") + (C == D ? " in place" : ""));
  return CUBLAS_STATUS_SUCCESS;
}
// ---------------- driver
#define DRV(name, ...) API CUresult name(__VA_ARGS__)
DRV(cuInit, unsigned) { return CUDA_SUCCESS; }
DRV(cuDriverGetVersion, int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
DRV(cuDeviceGet, CUdevice* d, int i) {
  *d = i;
  return CUDA_SUCCESS;
}
DRV(cuDeviceGetCount, int* n) {
  *n = NDEV;
  return CUDA_SUCCESS;
}
DRV(cuDeviceGetAttribute, int* v, CUdevice_attribute a, CUdevice) {
  attribute(a, v);
  return CUDA_SUCCESS;
}
DRV(cuDevicePrimaryCtxGetState, CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
DRV(cuDevicePrimaryCtxRetain, CUcontext* c, CUdevice) {
  *c = (CUcontext)0x1234;
  return CUDA_SUCCESS;
}
DRV(cuCtxGetCurrent, CUcontext* c) {
  *c = (CUcontext)0x1234;
  return CUDA_SUCCESS;
}
DRV(cuCtxSetCurrent, CUcontext) { return CUDA_SUCCESS; }
DRV(cuCtxGetDevice, CUdevice* d) {
  *d = cur_dev;
  return CUDA_SUCCESS;
}
DRV(cuGetErrorString, CUresult, const char** s) {
  *s = "fake";
  return CUDA_SUCCESS;
}
DRV(cuGetErrorName, CUresult, const char** s) {
  *s = "fake";
  return CUDA_SUCCESS;
}
struct Mod {
  int x;
};
static int modules = 0;
DRV(cuModuleLoadData, CUmodule* m, const void* image) {
  {
    Lock l(mu);
    modules++;
  }
  note("MODULE LOAD");
  *m = (CUmodule) new Mod;
  return CUDA_SUCCESS;
}
DRV(cuModuleLoadDataEx, CUmodule* m, const void* i, unsigned, CUjit_option*, void**) { return cuModuleLoadData(m, i); }
DRV(cuModuleLoad, CUmodule* m, const char*) {
  note("MODULE LOAD");
  *m = (CUmodule) new Mod;
  return CUDA_SUCCESS;
}
DRV(cuModuleUnload, CUmodule) { return CUDA_SUCCESS; }
static std::unordered_map<void*, std::string> fn;
DRV(cuModuleGetFunction, CUfunction* f, CUmodule, const char* n) {
  Lock l(mu);
  *f = (CUfunction)malloc(16);
  fn[*f] = n;
  return CUDA_SUCCESS;
}
DRV(cuFuncGetAttribute, int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
DRV(cuFuncSetAttribute, CUfunction, CUfunction_attribute a, int v) {
  if (a == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && v > SHARED_OPTIN) {
    note("BAD-SHARED");
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
DRV(cuFuncSetCacheConfig, CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
API int fg_modules() { return modules; }
// what each Triton launch was given: pointers are checked to lie in live device memory
DRV(cuLaunchKernelEx, const CUlaunchConfig* c, CUfunction f, void** params, void**) {
  return launched("TRITON", fn[f], dim3(c->gridDimX, c->gridDimY, c->gridDimZ), dim3(c->blockDimX, c->blockDimY, c->blockDimZ),
                  c->sharedMemBytes)
             ? CUDA_ERROR_INVALID_VALUE
             : CUDA_SUCCESS;
}
DRV(cuLaunchKernel, CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned s, CUstream,
    void**, void**) {
  return launched("TRITON", fn[f], dim3(gx, gy, gz), dim3(bx, by, bz), s) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
DRV(cuOccupancyMaxActiveClusters, int* n, CUfunction, const CUlaunchConfig*) {
  *n = 1;
  return CUDA_SUCCESS;
}
DRV(cuPointerGetAttribute, void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (!in_arena((void*)p)) {
    cudaPointerAttributes x;
    cudaPointerGetAttributes(&x, (void*)p);
    if (x.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  }
  *(CUdeviceptr*)v = p;
  return CUDA_SUCCESS;
}
DRV(cuTensorMapEncodeTiled, CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
DRV(cuGetProcAddress_v2, const char* s, void** p, int, cuuint64_t, CUdriverProcAddressQueryResult* r) {
  *p = dlsym(RTLD_DEFAULT, s);
  if (r) *r = *p ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *p ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
static CUresult nothing() { return CUDA_SUCCESS; }
API cudaError_t cudaGetDriverEntryPointByVersion(const char* s, void** p, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* r) {
  *p = dlsym(RTLD_DEFAULT, s);
  if (!*p) {
    if (verbose) fprintf(stderr, "[fakegpu] entry point %s\n", s);
    *p = (void*)nothing;
  }
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
DRV(cuCtxSetLimit, CUlimit, size_t) { return CUDA_SUCCESS; }
DRV(cuCtxGetLimit, size_t* v, CUlimit) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}
DRV(cuCtxGetApiVersion, CUcontext, unsigned* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
DRV(cuStreamSynchronize, CUstream s) { return (CUresult)sync_call("cuStreamSynchronize", s); }

DRV(cuDeviceGetUuid, CUuuid* u, CUdevice d) {
  memset(u, d + 1, sizeof *u);
  return CUDA_SUCCESS;
}
DRV(cuDeviceGetName, char* n, int l, CUdevice) {
  strncpy(n, NAME, l);
  return CUDA_SUCCESS;
}
DRV(cuOccupancyMaxActiveBlocksPerMultiprocessor, int* n, CUfunction, int, size_t) {
  *n = 2;
  return CUDA_SUCCESS;
}
DRV(cuKernelGetFunction, CUfunction* f, CUkernel k) {
  *f = (CUfunction)k;
  return CUDA_SUCCESS;
}
DRV(cuLibraryLoadData, CUlibrary* l, const void* d, CUjit_option*, void**, unsigned, CUlibraryOption*, void**, unsigned) {
  *l = (CUlibrary) new Mod;
  return CUDA_SUCCESS;
}
DRV(cuFuncGetModule, CUmodule* m, CUfunction) {
  *m = (CUmodule)1;
  return CUDA_SUCCESS;
}
