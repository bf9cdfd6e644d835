// How much more memory this process may take: what the machine has left, what its cgroup allows (a container, a Slurm
// job, a systemd unit), and what its own limits allow (ulimit -v and -d).
#ifndef LLMC_HOST_MEMORY_H
#define LLMC_HOST_MEMORY_H

#include <math.h>
#include <sys/resource.h>
#include "utils.h"

typedef struct {
    double bytes;               // INFINITY where the system does not say
    const char *limit;          // what sets it, for messages: "", " (ulimit -v)"
} HostMemory;

// The number after `name` in a file with a name and a number per line; with name "", the file's first number. -1: there
// is no such file or number, or it is "max".
LLMC_FN double host_number_(const char *path, const char *name) {
    char line[256];
    double number = -1;
    size_t n = strlen(name);
    FILE *f = fopen(path, "r");
    while (f && number < 0 && fgets(line, sizeof line, f))
        if (strncmp(line, name, n) != 0 || sscanf(line + n, "%lf", &number) != 1) number = -1;
    if (f) fclose(f);
    return number;
}

LLMC_FN void host_limit_(HostMemory *m, double bytes, const char *limit) {
    if (bytes < m->bytes) m->bytes = bytes > 0 ? bytes : 0, m->limit = limit;
}

// The files of a version of cgroups.
typedef struct {
    const char *folder, *limit, *usage;         // folder: where its tree of cgroups is, below /sys/fs/cgroup
    const char *file_cache;                     // in memory.stat: pages that are given up first, counted in usage
} CgroupFiles_;

// The limits of a cgroup and of those around it, up to the root. A container may see its own cgroup as the root, and
// its path on the host as its name: names that lead nowhere are skipped.
LLMC_FN void host_cgroup_(HostMemory *m, const char *root, const CgroupFiles_ *files, const char *name) {
    char *group = xasprintf("%s", name);
    for (;;) {
        char *folder = xasprintf("%s%s%s", root, files->folder, group), *slash = strrchr(group, '/');
        char *limit = xasprintf("%s/%s", folder, files->limit), *usage = xasprintf("%s/%s", folder, files->usage);
        char *stat = xasprintf("%s/memory.stat", folder);
        double most = host_number_(limit, ""), used = fmax(host_number_(usage, ""), 0);
        double cache = fmax(host_number_(stat, files->file_cache), 0);
        if (most >= 0) host_limit_(m, most - fmax(used - cache, 0), " (limit of the container or cgroup)");
        free(folder), free(limit), free(usage), free(stat);
        if (!slash) break;
        *slash = 0;
    }
    free(group);
}

// The same for all cgroups of this process. root: /sys/fs/cgroup; membership: /proc/self/cgroup, whose lines are
// "0::/NAME" for version 2 and "NUMBER:memory:/NAME" for version 1.
LLMC_FN void host_cgroups_(HostMemory *m, const char *root, const char *membership) {
    static const CgroupFiles_ v1 = {"/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"};
    static const CgroupFiles_ v2[] = {{"", "memory.max", "memory.current", "inactive_file"},
                                      {"/unified", "memory.max", "memory.current", "inactive_file"}};
    char line[4096];
    FILE *f = fopen(membership, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *controllers = strchr(line, ':'), *name = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!name) continue;
        *name++ = 0;
        name[strcspn(name, "\n")] = 0;
        if (strstr(controllers, "memory")) host_cgroup_(m, root, &v1, name);
        for (int i = 0; i < 2 && !strcmp(controllers, ":"); i++) host_cgroup_(m, root, &v2[i], name);
    }
    if (f) fclose(f);
}

// Bytes that `processes` processes like this one can take together without swapping.
LLMC_FN HostMemory host_memory(int processes) {
    static const struct { int which; const char *used, *limit; } own[] = {
        {RLIMIT_AS, "VmSize:", " (ulimit -v)"}, {RLIMIT_DATA, "VmData:", " (ulimit -d)"}};
    HostMemory m = {INFINITY, ""};
    double left = host_number_("/proc/meminfo", "MemAvailable:");
    if (left >= 0) m.bytes = left * 1024;
    host_cgroups_(&m, "/sys/fs/cgroup", "/proc/self/cgroup");
    for (int i = 0; i < 2; i++) {
        struct rlimit r;
        double used = fmax(host_number_("/proc/self/status", own[i].used), 0) * 1024;
        if (getrlimit(own[i].which, &r) == 0 && r.rlim_cur != RLIM_INFINITY)
            host_limit_(&m, ((double)r.rlim_cur - used) * processes, own[i].limit);
    }
    return m;
}

#endif
