/* Fails one call of the system below a folder, or lists them all: see faults.py, which loads it
   before the C library. A site is a function, a path below the folder (drawn names as #) and which
   of such calls it is. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 2048

static struct fault {
    char site[512];
    long first, times;
    int number, half;
    atomic_long seen;
} faults[MOST];
static int count, log_handle = -1, failed_handle = -1;
static char root[PATH_MAX];
static size_t root_length;
static atomic_int active;

/* where: "open clips/a.wav". nth: the first of its calls that fails, from 1 on; times: how many of
   them; error: their errno. halved: before they fail, one write is done by half. */
void faults_add(const char *where, long nth, long times, int error, int halved) {
    if (count == MOST)
        return;
    struct fault *new = &faults[count++];
    snprintf(new->site, sizeof new->site, "%s", where);
    new->first = nth, new->times = times, new->number = error, new->half = halved;
}

/* From now on. log: a handle that every call is written to, or -1; failed: those that fail. */
void faults_begin(const char *folder, int log, int failed) {
    snprintf(root, sizeof root, "%s/", folder);
    root_length = strlen(root);
    log_handle = log, failed_handle = failed;
    atomic_store(&active, 1);
}

static int is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

/* 1: this call fails, errno is set. 2: it is to be done by half. */
static int check(const char *function, const char *path) {
    if (!path || strncmp(path, root, root_length))
        return 0;
    char found[PATH_MAX + 32];
    size_t at = snprintf(found, sizeof found, "%s ", function);
    for (const char *c = path + root_length; *c && at < sizeof found - 2;) {
        size_t run = 0;
        while (is_hex(c[run]))
            run++;
        if (run >= 6) {
            found[at++] = '#', c += run;
            continue;
        }
        found[at++] = *c++;
    }
    found[at] = 0;
    char *deleted = strstr(found, " (deleted)");
    if (deleted)
        *deleted = 0, at = deleted - found;
    char *drawn = strstr(found, "tfevents"); /* time, host and process follow */
    if (drawn)
        drawn[8] = 0, at = drawn + 8 - found;
    if (log_handle >= 0) {
        found[at] = '\n';
        syscall(SYS_write, log_handle, found, at + 1);
        found[at] = 0;
    }
    for (struct fault *fault = faults; fault < faults + count; fault++) {
        if (strcmp(found, fault->site))
            continue;
        long place = atomic_fetch_add(&fault->seen, 1) + 1;
        if (fault->half && place == fault->first)
            return 2;
        place -= fault->half;
        if (place < fault->first || place >= fault->first + fault->times)
            continue;
        found[at] = '\n';
        syscall(SYS_write, failed_handle, found, at + 1);
        errno = fault->number;
        return 1;
    }
    return 0;
}

static const char *of_handle(int handle, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX - 1);
    if (length <= 0)
        return 0;
    buffer[length] = 0;
    return buffer;
}

static const char *absolute(int folder, const char *path, char *buffer) {
    if (!path || path[0] == '/')
        return path;
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) <= 0)
            return 0;
    } else if (!of_handle(folder, base))
        return 0;
    if (!*path)
        snprintf(buffer, PATH_MAX, "%s", base);
    else
        snprintf(buffer, PATH_MAX, "%s/%s", base, path);
    return buffer;
}

static int fails(const char *function, int folder, const char *path) {
    if (!atomic_load(&active))
        return 0;
    int kept = errno;
    char buffer[PATH_MAX];
    int found = check(function, absolute(folder, path, buffer));
    if (found != 1)
        errno = kept;
    return found;
}

static int fails_on(const char *function, int handle) {
    if (!atomic_load(&active))
        return 0;
    int kept = errno;
    char buffer[PATH_MAX];
    int found = check(function, of_handle(handle, buffer));
    if (found != 1)
        errno = kept;
    return found;
}

#define REAL(type, name, ...)                                                                      \
    static type (*real)(__VA_ARGS__);                                                              \
    if (!real)                                                                                     \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        REAL(int, name, const char *, int, ...)                                                    \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0;                  \
        va_end(list);                                                                              \
        const char *how = flags & O_DIRECTORY ? "listdir" : flags & O_CREAT ? "create" : "open";   \
        return fails(how, AT_FDCWD, path) ? -1 : real(path, flags, mode);                          \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    int name(int folder, const char *path, int flags, ...) {                                       \
        REAL(int, name, int, const char *, int, ...)                                               \
        va_list list;                                                                              \
        va_start(list, flags);                                                                     \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(list, mode_t) : 0;                  \
        va_end(list);                                                                              \
        const char *how = flags & O_DIRECTORY ? "listdir" : flags & O_CREAT ? "create" : "open";   \
        return fails(how, folder, path) ? -1 : real(folder, path, flags, mode);                    \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                                \
    FILE *name(const char *path, const char *mode) {                                               \
        REAL(FILE *, name, const char *, const char *)                                             \
        return fails(*mode == 'r' ? "open" : "create", AT_FDCWD, path) ? 0 : real(path, mode);     \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t read(int handle, void *data, size_t size) {
    REAL(ssize_t, read, int, void *, size_t)
    return fails_on("read", handle) ? -1 : real(handle, data, size);
}

#define PREAD(name)                                                                                \
    ssize_t name(int handle, void *data, size_t size, off_t at) {                                  \
        REAL(ssize_t, name, int, void *, size_t, off_t)                                            \
        return fails_on("read", handle) ? -1 : real(handle, data, size, at);                       \
    }
PREAD(pread)
PREAD(pread64)

ssize_t write(int handle, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t)
    int found = fails_on("write", handle);
    return found == 1 ? -1 : real(handle, data, found == 2 ? (size + 1) / 2 : size);
}

#define PWRITE(name)                                                                               \
    ssize_t name(int handle, const void *data, size_t size, off_t at) {                            \
        REAL(ssize_t, name, int, const void *, size_t, off_t)                                      \
        int found = fails_on("write", handle);                                                     \
        return found == 1 ? -1 : real(handle, data, found == 2 ? (size + 1) / 2 : size, at);       \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int handle, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int)
    return fails_on("write", handle) == 1 ? -1 : real(handle, parts, count);
}

#define ON_HANDLE(name, called)                                                                    \
    int name(int handle) {                                                                         \
        REAL(int, name, int)                                                                       \
        return fails_on(called, handle) ? -1 : real(handle);                                       \
    }
ON_HANDLE(fsync, "fsync")
ON_HANDLE(fdatasync, "fsync")

#define TRUNCATE(name)                                                                             \
    int name(int handle, off_t size) {                                                             \
        REAL(int, name, int, off_t)                                                                \
        return fails_on("truncate", handle) ? -1 : real(handle, size);                             \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ON_PATH(name, called)                                                                      \
    int name(const char *path) {                                                                   \
        REAL(int, name, const char *)                                                              \
        return fails(called, AT_FDCWD, path) ? -1 : real(path);                                    \
    }
ON_PATH(unlink, "unlink")
ON_PATH(rmdir, "rmdir")

int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int)
    const char *called = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return fails(called, folder, path) ? -1 : real(folder, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t)
    return fails("mkdir", AT_FDCWD, path) ? -1 : real(path, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t)
    return fails("mkdir", folder, path) ? -1 : real(folder, path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *)
    return fails("rename", AT_FDCWD, to) ? -1 : real(from, to);
}

int renameat(int a, const char *from, int b, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *)
    return fails("rename", b, to) ? -1 : real(a, from, b, to);
}

int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *)
    return fails("link", AT_FDCWD, to) ? -1 : real(from, to);
}

#define STAT(name, kind)                                                                           \
    int name(const char *path, struct kind *found) {                                               \
        REAL(int, name, const char *, struct kind *)                                               \
        return fails("stat", AT_FDCWD, path) ? -1 : real(path, found);                             \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)

#define FSTAT(name, kind)                                                                          \
    int name(int handle, struct kind *found) {                                                     \
        REAL(int, name, int, struct kind *)                                                        \
        return fails_on("fstat", handle) ? -1 : real(handle, found);                               \
    }
FSTAT(fstat, stat)
FSTAT(fstat64, stat64)

#define FSTATAT(name, kind)                                                                        \
    int name(int folder, const char *path, struct kind *found, int flags) {                        \
        REAL(int, name, int, const char *, struct kind *, int)                                     \
        return fails("stat", folder, path) ? -1 : real(folder, path, found, flags);                \
    }
FSTATAT(fstatat, stat)
FSTATAT(fstatat64, stat64)

int statx(int folder, const char *restrict path, int flags, unsigned mask,
          struct statx *restrict found) {
    REAL(int, statx, int, const char *, int, unsigned, struct statx *)
    const char *called = *path ? "stat" : "fstat";
    return fails(called, folder, path) ? -1 : real(folder, path, flags, mask, found);
}

int access(const char *path, int mode) {
    REAL(int, access, const char *, int)
    return fails("stat", AT_FDCWD, path) ? -1 : real(path, mode);
}

DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *)
    return fails("listdir", AT_FDCWD, path) ? 0 : real(path);
}
