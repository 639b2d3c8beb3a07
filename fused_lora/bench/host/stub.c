/* A libcuda.so.1 that does nothing: Triton's driver and launcher run over it as over a GPU, and what is left is the
 * host's own time. It has what Triton 3.6 to 3.8 ask for; the numbers are an H100's. */
#define __CUDA_API_VERSION_INTERNAL
#include "cuda.h"
#include <string.h>

#undef cuPointerGetAttribute

#define NOTHING { return CUDA_SUCCESS; }
#define GIVES(pointer, value) { *(pointer) = (value); return CUDA_SUCCESS; }

/* how many kernels were launched */
unsigned long long stub_launches = 0;

CUresult cuInit(unsigned flags) NOTHING
CUresult cuDriverGetVersion(int *version) GIVES(version, 13000)
CUresult cuGetErrorString(CUresult error, const char **text) GIVES(text, "an error of the stub")
CUresult cuDeviceGetCount(int *count) GIVES(count, 1)
CUresult cuDeviceGet(CUdevice *device, int ordinal) GIVES(device, ordinal)
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) GIVES(context, (CUcontext)1)
CUresult cuCtxGetCurrent(CUcontext *context) GIVES(context, (CUcontext)1)
CUresult cuCtxGetDevice(CUdevice *device) GIVES(device, 0)
CUresult cuCtxSetCurrent(CUcontext context) NOTHING
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) GIVES(value, 0)
CUresult cuCtxSetLimit(CUlimit limit, size_t value) NOTHING

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device)
{
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: GIVES(value, 132)
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: GIVES(value, 65536)
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: GIVES(value, 32)
    default: GIVES(value, 232448) /* shared memory of a block, in bytes */
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) GIVES(module, (CUmodule)16)
CUresult cuModuleUnload(CUmodule module) NOTHING
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) GIVES(function, (CUfunction)32)
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function)
    GIVES(value, attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0)
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) NOTHING
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) NOTHING
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) GIVES(count, 1)

/* every address is one of the device */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer)
    GIVES((CUdeviceptr *)data, pointer)
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr pointer)
    NOTHING

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra)
{
    stub_launches++;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill)
{
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
