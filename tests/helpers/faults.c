/* Preloaded: counts the file-system calls below a path, and makes one of them fail. Compiled and used by fault_campaign.py. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* `only_plain` leaves out what not every file system has: renameat2, and files without names. */
enum { SIGNAL, ERROR, ERRORS, SHORT }; /* what happens: a signal, one error, errors from then on, a short write */

static char below[PATH_MAX];
static size_t length;
static int kind, value, plain;
static long at;
static atomic_long calls;
static atomic_char ours[65536];

void faults_arm(const char *path, int what, int with, long number, int only_plain) {
    length = strlen(path);
    memcpy(below, path, length + 1);
    kind = what, value = with, at = number, plain = only_plain;
    atomic_store(&calls, 0);
}

long faults_calls(void) { return atomic_load(&calls); }

static int path_ours(int folder, const char *path) {
    if (!length || !path) return 0;
    if (path[0] == '/') return !strncmp(path, below, length);
    return folder >= 0 && folder < 65536 && ours[folder];
}

static int fd_ours(int fd) { return length && fd >= 0 && fd < 65536 && ours[fd]; }

/* Counts a call; returns whether it is to fail, with errno set. `writes` says whether it needs room on the disk. */
static int fails(int writes) {
    if (kind == SHORT) return 0;
    if (kind == ERRORS && value == ENOSPC && !writes) return 0;
    long number = atomic_fetch_add(&calls, 1);
    if (number != at && !(kind == ERRORS && at >= 0 && number > at)) return 0;
    if (kind == SIGNAL) {
        kill(getpid(), value);
        return 0;
    }
    errno = value;
    return 1;
}

static size_t allowed(size_t count) { /* of a write in SHORT mode */
    if (kind != SHORT || atomic_fetch_add(&calls, 1) != at || count < 2) return count;
    return count / 2;
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define MODE mode_t mode = 0; if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define OPEN(name, parameters, arguments, folder, path) \
    int name parameters { \
        MODE \
        int mine = path_ours(folder, path); \
        if (mine && plain && (flags & __O_TMPFILE) == __O_TMPFILE) { errno = EOPNOTSUPP; return -1; } \
        if (mine && fails(flags & (O_CREAT | O_TRUNC))) return -1; \
        int fd = REAL(name) arguments; \
        if (fd >= 0 && fd < 65536) ours[fd] = mine; \
        return fd; \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), -1, path)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), -1, path)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder, path)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder, path)

#define WRITE(name, parameters, arguments) \
    ssize_t name parameters { \
        if (fd_ours(fd)) { \
            if (fails(1)) return -1; \
            count = allowed(count); \
        } \
        return REAL(name) arguments; \
    }
WRITE(write, (int fd, const void *data, size_t count), (fd, data, count))
WRITE(pwrite, (int fd, const void *data, size_t count, off_t where), (fd, data, count, where))
WRITE(pwrite64, (int fd, const void *data, size_t count, off64_t where), (fd, data, count, where))

#define CALL(type, name, parameters, arguments, mine, writes) \
    type name parameters { \
        if ((mine) && fails(writes)) return -1; \
        return REAL(name) arguments; \
    }
CALL(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), fd_ours(fd), 1)
CALL(int, ftruncate, (int fd, off_t size), (fd, size), fd_ours(fd), 1)
CALL(int, ftruncate64, (int fd, off64_t size), (fd, size), fd_ours(fd), 1)
CALL(int, fsync, (int fd), (fd), fd_ours(fd), 1)
CALL(int, fdatasync, (int fd), (fd), fd_ours(fd), 1)
CALL(int, flock, (int fd, int how), (fd, how), fd_ours(fd), 0)
CALL(int, fchmod, (int fd, mode_t mode), (fd, mode), fd_ours(fd), 0)
CALL(int, chmod, (const char *path, mode_t mode), (path, mode), path_ours(-1, path), 0)
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode), path_ours(-1, path), 1)
CALL(int, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), path_ours(folder, path), 1)
CALL(int, rmdir, (const char *path), (path), path_ours(-1, path), 0)
CALL(int, unlink, (const char *path), (path), path_ours(-1, path), 0)
CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags), path_ours(folder, path), 0)
CALL(int, rename, (const char *old, const char *new), (old, new), path_ours(-1, new), 1)
CALL(int, renameat, (int from, const char *old, int to, const char *new), (from, old, to, new), path_ours(to, new), 1)
CALL(int, link, (const char *old, const char *new), (old, new), path_ours(-1, new), 1)
CALL(int, linkat, (int from, const char *old, int to, const char *new, int flags), (from, old, to, new, flags), path_ours(to, new), 1)
CALL(int, symlink, (const char *old, const char *new), (old, new), path_ours(-1, new), 1)
CALL(int, setxattr, (const char *path, const char *name, const void *data, size_t size, int flags), (path, name, data, size, flags),
     path_ours(-1, path), 1)
CALL(ssize_t, pread64, (int fd, void *data, size_t count, off64_t where), (fd, data, count, where), fd_ours(fd), 0)
CALL(ssize_t, read, (int fd, void *data, size_t count), (fd, data, count), fd_ours(fd), 0)
CALL(int, stat64, (const char *path, struct stat64 *status), (path, status), path_ours(-1, path), 0)
CALL(int, lstat64, (const char *path, struct stat64 *status), (path, status), path_ours(-1, path), 0)

CALL(int, fstat64, (int fd, struct stat64 *status), (fd, status), fd_ours(fd), 0)
CALL(int, fstatat64, (int folder, const char *path, struct stat64 *status, int flags), (folder, path, status, flags),
     path_ours(folder, path), 0)
CALL(int, access, (const char *path, int mode), (path, mode), path_ours(-1, path), 0)
CALL(ssize_t, getxattr, (const char *path, const char *name, void *data, size_t size), (path, name, data, size), path_ours(-1, path), 0)

DIR *opendir(const char *path) {
    if (path_ours(-1, path) && fails(0)) return NULL;
    return REAL(opendir)(path);
}

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    if (plain && length) {
        errno = ENOSYS;
        return -1;
    }
    if (path_ours(to, new) && fails(1)) return -1;
    return REAL(renameat2)(from, old, to, new, flags);
}

int close(int fd) {
    int mine = fd_ours(fd);
    if (fd >= 0 && fd < 65536) ours[fd] = 0;
    if (mine && fails(0)) { /* which closes all the same */
        int error = errno;
        REAL(close)(fd);
        errno = error;
        return -1;
    }
    return REAL(close)(fd);
}
