// A stand-in for NVIDIA's management library. It describes the GPUs of the file that STANDIN_GPUS names, which
// tests/cuda/gpus.py writes, and reads the file at every call. A function that is missing here is one that the driver
// does not know.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };
enum { MOST_GPUS = 64, LINE = 512 };

typedef struct {
    char kind[8], name[96], uuid[96], processes[256];
    unsigned long long total_mib, used_mib;
    unsigned nvlinks;
} Gpu;
struct memory { unsigned long long total, free, used; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };

// Reads the GPU of a line, counted from 0; returns whether there is such a line.
static int read_gpu(long wanted, Gpu *gpu) {
    const char *path = getenv("STANDIN_GPUS");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[LINE];
    int found = 0;
    for (long number = 0; file && fgets(line, sizeof line, file); number++) {
        if (number != wanted) continue;
        memset(gpu, 0, sizeof *gpu);
        found = sscanf(line, "%7[^|]|%95[^|]|%95[^|]|%llu|%llu|%u|%255[^\n]", gpu->kind, gpu->name, gpu->uuid,
                       &gpu->total_mib, &gpu->used_mib, &gpu->nvlinks, gpu->processes) >= 6;
        break;
    }
    if (file) fclose(file);
    return found;
}

static int of_handle(void *handle, Gpu *gpu) {
    if (!read_gpu((long)handle - 1, gpu)) return INVALID_ARGUMENT;
    return strcmp(gpu->kind, "lost") ? SUCCESS : GPU_IS_LOST;
}

int nvmlInit_v2(void) { return getenv("STANDIN_GPUS") ? SUCCESS : 9; }
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "error of the stand-in"; }

int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    snprintf(text, length, "580.159.04");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    Gpu gpu;
    *count = 0;
    for (long number = 0; number < MOST_GPUS && read_gpu(number, &gpu); number++) *count += strcmp(gpu.kind, "mig") != 0;
    return SUCCESS;
}
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }

// The slices of a GPU follow it in the file, and have no index of their own.
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    Gpu gpu;
    for (long number = 0; read_gpu(number, &gpu); number++)
        if (strcmp(gpu.kind, "mig") && index-- == 0) {
            *handle = (void *)(number + 1);
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    Gpu gpu;
    for (long number = 0; read_gpu(number, &gpu); number++)
        if (!strcmp(gpu.uuid, uuid)) {
            *handle = (void *)(number + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned length) {
    Gpu gpu;
    int code = of_handle(handle, &gpu);
    if (!code) snprintf(text, length, "%s", gpu.uuid);
    return code;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned length) {
    Gpu gpu;
    int code = of_handle(handle, &gpu);
    if (!code) snprintf(text, length, "%s", gpu.name);
    return code;
}

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    Gpu gpu;
    int code = of_handle(handle, &gpu);
    if (code) return code;
    memory->total = gpu.total_mib << 20;
    memory->used = gpu.used_mib << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *processes) {
    Gpu gpu;
    int code = of_handle(handle, &gpu);
    if (code) return code;
    unsigned room = *count, pid, used_mib;
    *count = 0;
    for (char *part = strtok(gpu.processes, ","); part; part = strtok(NULL, ",")) {
        if (sscanf(part, "%u:%u", &pid, &used_mib) != 2) continue;
        if (processes && *count < room)
            processes[*count] = (struct process){pid, (unsigned long long)used_mib << 20, -1, -1};
        ++*count;
    }
    return *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetNvLinkState(void *handle, unsigned link, unsigned *active) {
    Gpu gpu;
    int code = of_handle(handle, &gpu);
    if (code) return code;
    *active = 1;
    return link < gpu.nvlinks ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMaxPcieLinkGeneration(void *handle, unsigned *generation) {
    (void)handle;
    *generation = 5;
    return SUCCESS;
}

int nvmlDeviceGetMaxPcieLinkWidth(void *handle, unsigned *lanes) {
    (void)handle;
    *lanes = 16;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(void *handle, int domain, unsigned *mhz) {
    (void)handle, (void)domain;
    *mhz = 1980;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    (void)handle;
    *milliwatts = 350000;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    (void)handle, (void)sensor;
    *celsius = 55;
    return SUCCESS;
}
