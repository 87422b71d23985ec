/* Loaded into jobs with LD_PRELOAD. What it changes is what the tests cannot do to a machine that others use too.
 *
 * TEST_CLOCK_FILE: eight bytes, a signed number of seconds by which the wall clock is off, read at every look at it. Only
 * Python sees it: C++ below Ray turns wall clock times into deadlines for the kernel, which keeps the true time.
 *
 * TEST_SLOW_WRITES: a write to a journal happens in two halves with a pause between, and so does the step from a part that is
 * written to one that is on the disk, so that a test can kill the writer there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define PAUSE_US 400000

static const volatile int64_t *offset;

__attribute__((constructor)) static void open_clock_file(void) {
    const char *name = getenv("TEST_CLOCK_FILE");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        void *page = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
        if (page != MAP_FAILED) offset = page;
        close(file);
    }
}

static int64_t offset_for(const void *caller) {
    Dl_info info;
    if (!offset || !dladdr(caller, &info) || !info.dli_fname) return 0;
    const char *base = strrchr(info.dli_fname, '/');
    base = base ? base + 1 : info.dli_fname;
    return strncmp(base, "python", 6) == 0 || strncmp(base, "libpython", 9) == 0 ? *offset : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (result == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += offset_for(__builtin_return_address(0));
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(now, zone);
    if (result == 0) now->tv_sec += offset_for(__builtin_return_address(0));
    return result;
}

time_t time(time_t *where) {
    static time_t (*real)(time_t *);
    if (!real) real = (time_t (*)(time_t *))dlsym(RTLD_NEXT, "time");
    time_t now = real(NULL) + offset_for(__builtin_return_address(0));
    if (where) *where = now;
    return now;
}

/* Whether the file behind `handle` has `part` in its path. */
static int is_in(int handle, const char *part) {
    char link[64], path[4096];
    if (!getenv("TEST_SLOW_WRITES")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return strstr(path, part) != NULL;
}

ssize_t write(int handle, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (size < 2 || !is_in(handle, "/_run/journal/")) return real(handle, data, size);
    ssize_t first = real(handle, data, size / 2);
    if (first < 0) return first;
    usleep(PAUSE_US);
    ssize_t second = real(handle, (const char *)data + first, size - first);
    return second < 0 ? first : first + second;
}

int fsync(int handle) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    if (is_in(handle, "/_run/tmp/part-")) usleep(PAUSE_US);
    return real(handle);
}
