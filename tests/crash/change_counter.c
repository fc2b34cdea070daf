/* Count the calls that change the disk below a prefix, over all threads, and end, fail or shorten the n-th of them.

   Preloaded into a process of the test session (LD_PRELOAD) and armed through `changes_arm`. Everything is decided before
   the call runs: a process ended at call n has made exactly the calls before n. Linux with glibc only.

   Not seen: stores into shared mappings, io_uring, stdio (glibc calls itself inside), and system calls that do not go
   through these functions. The test session checks by the log that what it relies on is seen. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { END_KILL = 0, END_CUT = 1, END_FLUSH_AND_CUT = 2 };
enum { LIE_FILES = 1, LIE_FOLDERS = 2 };

struct plan {
    long end_at;         /* end the process instead of this call; 0: never */
    int end_how;         /* END_... */
    long fail_at;        /* this call fails; 0: none */
    int fail_errno;
    int fail_from;       /* so does every later one that takes room */
    long short_at;       /* this call, if it writes, writes half; 0: none */
    int refuse_flags;    /* renameat2 with flags is unknown to this file system */
    int lie;             /* LIE_...: say that it is synced, and do nothing */
    const char *prefix;  /* absolute, no slash at the end */
    const char *mount;   /* where the file system is mounted that loses its power */
    const char *log;     /* a file outside the prefix; "": no log */
};

static struct {
    struct plan plan;
    char prefix[PATH_MAX], mount[PATH_MAX];
    int log;
} set = {.log = -1};
static atomic_int armed;
static atomic_long count;

#define REAL(name)                                               \
    ({                                                           \
        static _Atomic(void *) found;                            \
        if (!found) found = dlsym(RTLD_NEXT, #name);             \
        (__typeof__(&name))(void *)found;                        \
    })

/* Linux 4.9, ext4 and XFS: stop at once, without writing the log. */
#define SHUTDOWN _IOR('X', 125, unsigned)
#define NO_LOG_FLUSH 2u

static void flush_the_journal(void) {
    char path[PATH_MAX + 16];
    snprintf(path, sizeof path, "%s/unrelated", set.mount);
    int file = REAL(open)(path, O_CREAT | O_WRONLY, 0600);
    if (file < 0 || REAL(write)(file, "x", 1) != 1 || REAL(fsync)(file)) _exit(97);
    close(file);
}

/* Let the process, or the machine under the file system, stop here. */
void changes_end(void) {
    if (set.plan.end_how == END_FLUSH_AND_CUT) flush_the_journal();
    if (set.plan.end_how != END_KILL) {
        unsigned how = NO_LOG_FLUSH;
        int root = REAL(open)(set.mount, O_RDONLY);
        if (root < 0 || ioctl(root, SHUTDOWN, &how)) _exit(98);
    }
    for (;;) kill(getpid(), SIGKILL);
}

void changes_arm(const struct plan *plan) {
    set.plan = *plan;
    snprintf(set.prefix, sizeof set.prefix, "%s", plan->prefix);
    snprintf(set.mount, sizeof set.mount, "%s", plan->mount);
    set.log = *plan->log ? REAL(open)(plan->log, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600) : -1;
    count = 0;
    armed = 1;
}

long changes_disarm(void) {
    armed = 0;
    if (set.log >= 0) close(set.log);
    set.log = -1;
    return count;
}

static int is_below(const char *path) {
    size_t length = strlen(set.prefix);
    return !strncmp(path, set.prefix, length) && (path[length] == '/' || !path[length]);
}

/* Write the absolute form of a path, or of an open file where path is NULL; "" if there is none. */
static void absolute(char *into, int at, const char *path) {
    char link[64], base[PATH_MAX] = "";
    if (path && *path == '/') {
        snprintf(into, PATH_MAX, "%s", path);
        return;
    }
    if (at == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) *base = 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    size_t used = (size_t)snprintf(into, PATH_MAX, "%s", base);
    if (path && used < PATH_MAX) snprintf(into + used, PATH_MAX - used, "/%s", path);
}

static void note(long number, const char *call, const char *path) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call, path);
    if (set.log >= 0 && REAL(write)(set.log, line, (size_t)length) != length) _exit(96);
}

/* On a full disk, names can still be moved and removed, and what is there already can be synced. */
static int takes_room(const char *call) {
    static const char *const need_none[] = {"unlink", "rmdir", "rename", "fsync", "fdatasync", "sync", "chmod", "fchmod"};
    for (size_t i = 0; i < sizeof need_none / sizeof *need_none; i++)
        if (!strncmp(call, need_none[i], strlen(need_none[i]))) return 0;
    return 1;
}

/* Count one call; returns the error it must fail with, 0 to go on, or not at all. `halve` is told to write half. */
static int change(const char *call, const char *path, int *halve) {
    long number = atomic_fetch_add(&count, 1) + 1;
    note(number, call, path);
    if (set.plan.end_at && number == set.plan.end_at) changes_end();
    /* Whoever comes after the end must not change anything while the signal is on its way. */
    while (set.plan.end_at && number > set.plan.end_at) pause();
    if (halve) *halve = number == set.plan.short_at;
    if (set.plan.fail_at && number == set.plan.fail_at) return set.plan.fail_errno;
    if (set.plan.fail_from && number > set.plan.fail_at && takes_room(call)) return set.plan.fail_errno;
    return 0;
}

static int change_at(const char *call, int at, const char *path, int *halve) {
    char whole[PATH_MAX];
    int before = errno, error = 0;
    if (!armed) return 0;
    absolute(whole, at, path);
    if (is_below(whole)) error = change(call, whole, halve);
    errno = before;
    return error;
}

static int change_two(const char *call, int at, const char *path, int to_at, const char *to) {
    char one[PATH_MAX], other[PATH_MAX], both[2 * PATH_MAX + 8];
    int before = errno, error = 0;
    if (!armed) return 0;
    absolute(one, at, path);
    absolute(other, to_at, to);
    snprintf(both, sizeof both, "%s -> %s", one, other);
    if (is_below(one) || is_below(other)) error = change(call, both, NULL);
    errno = before;
    return error;
}

static int refused(int error) {
    errno = error;
    return -1;
}

#define GUARD(error)                       \
    do {                                   \
        int found_ = (error);              \
        if (found_) return refused(found_); \
    } while (0)

/* --- opening ------------------------------------------------------------------------------------------------------ */

static int changes_by_opening(int flags) {
    return (flags & (O_CREAT | O_TRUNC)) || (flags & O_TMPFILE) == O_TMPFILE;
}

#define OPEN(name, at, declared, passed)                                         \
    int name(declared const char *path, int flags, ...) {                        \
        va_list rest;                                                            \
        va_start(rest, flags);                                                   \
        mode_t mode = changes_by_opening(flags) ? va_arg(rest, mode_t) : 0;      \
        va_end(rest);                                                            \
        if (changes_by_opening(flags)) GUARD(change_at(#name, at, path, NULL));  \
        return REAL(name)(passed path, flags, mode);                             \
    }
#define NOTHING
#define DIRECTORY_ARGUMENT int directory,
#define DIRECTORY directory,
OPEN(open, AT_FDCWD, NOTHING, NOTHING)
OPEN(open64, AT_FDCWD, NOTHING, NOTHING)
OPEN(openat, directory, DIRECTORY_ARGUMENT, DIRECTORY)
OPEN(openat64, directory, DIRECTORY_ARGUMENT, DIRECTORY)

#define CREAT(name)                                              \
    int name(const char *path, mode_t mode) {                    \
        GUARD(change_at(#name, AT_FDCWD, path, NULL));           \
        return REAL(name)(path, mode);                           \
    }
CREAT(creat)
CREAT(creat64)

/* --- writing ------------------------------------------------------------------------------------------------------ */

static size_t half(int wanted, size_t size) { return wanted && size > 1 ? size / 2 : size; }

ssize_t write(int file, const void *data, size_t size) {
    int halve = 0;
    GUARD(change_at("write", file, NULL, &halve));
    return REAL(write)(file, data, half(halve, size));
}

#define PWRITE(name, offset_type)                                                \
    ssize_t name(int file, const void *data, size_t size, offset_type offset) {  \
        int halve = 0;                                                           \
        GUARD(change_at(#name, file, NULL, &halve));                             \
        return REAL(name)(file, data, half(halve, size), offset);                \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

/* A halved gather write stores half of its first buffer. */
#define WRITEV(name, declared, passed)                                           \
    ssize_t name(int file, const struct iovec *parts, int number declared) {     \
        int halve = 0;                                                           \
        GUARD(change_at(#name, file, NULL, &halve));                             \
        struct iovec first = number > 0 ? *parts : (struct iovec){0};            \
        first.iov_len = half(halve, first.iov_len);                              \
        if (halve && number > 0) return REAL(name)(file, &first, 1 passed);      \
        return REAL(name)(file, parts, number passed);                           \
    }
#define COMMA ,
WRITEV(writev, , )
WRITEV(pwritev, COMMA off_t offset, COMMA offset)
WRITEV(pwritev64, COMMA off64_t offset, COMMA offset)
WRITEV(pwritev2, COMMA off_t offset COMMA int flags, COMMA offset COMMA flags)
WRITEV(pwritev64v2, COMMA off64_t offset COMMA int flags, COMMA offset COMMA flags)

#define SENDFILE(name, offset_type)                                       \
    ssize_t name(int to, int from, offset_type *offset, size_t size) {    \
        GUARD(change_at(#name, to, NULL, NULL));                          \
        return REAL(name)(to, from, offset, size);                        \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *offset, size_t size, unsigned flags) {
    GUARD(change_at("copy_file_range", to, NULL, NULL));
    return REAL(copy_file_range)(from, start, to, offset, size, flags);
}

/* --- calls on an open file ---------------------------------------------------------------------------------------- */

#define ON_FILE(name, declared, passed)             \
    int name(int file declared) {                   \
        GUARD(change_at(#name, file, NULL, NULL));  \
        return REAL(name)(file passed);             \
    }
static int is_lied_about(int file) {
    struct stat known;
    if (!armed || !set.plan.lie || fstat(file, &known)) return 0;
    return set.plan.lie & (S_ISDIR(known.st_mode) ? LIE_FOLDERS : LIE_FILES);
}

#define SYNC(name)                                  \
    int name(int file) {                            \
        GUARD(change_at(#name, file, NULL, NULL));  \
        return is_lied_about(file) ? 0 : REAL(name)(file); \
    }
SYNC(fsync)
SYNC(fdatasync)
SYNC(syncfs)
ON_FILE(ftruncate, COMMA off_t size, COMMA size)
ON_FILE(ftruncate64, COMMA off64_t size, COMMA size)
ON_FILE(fallocate, COMMA int mode COMMA off_t offset COMMA off_t size, COMMA mode COMMA offset COMMA size)
ON_FILE(fallocate64, COMMA int mode COMMA off64_t offset COMMA off64_t size, COMMA mode COMMA offset COMMA size)
ON_FILE(fchmod, COMMA mode_t mode, COMMA mode)

/* A hint that comes true makes the sync of a file look unneeded: whoever lies about the one must not follow the other. */
int sync_file_range(int file, off64_t offset, off64_t size, unsigned flags) {
    GUARD(change_at("sync_file_range", file, NULL, NULL));
    return is_lied_about(file) ? 0 : REAL(sync_file_range)(file, offset, size, flags);
}

/* These two return the error. */
#define POSIX_FALLOCATE(name, offset_type)                              \
    int name(int file, offset_type offset, offset_type size) {          \
        int error = change_at(#name, file, NULL, NULL);                 \
        return error ? error : REAL(name)(file, offset, size);          \
    }
POSIX_FALLOCATE(posix_fallocate, off_t)
POSIX_FALLOCATE(posix_fallocate64, off64_t)

/* --- calls on a name ---------------------------------------------------------------------------------------------- */

#define ON_NAME(name, declared, passed)                  \
    int name(const char *path declared) {                \
        GUARD(change_at(#name, AT_FDCWD, path, NULL));   \
        return REAL(name)(path passed);                  \
    }
#define ON_NAME_AT(name, declared, passed)                       \
    int name(int directory, const char *path declared) {         \
        GUARD(change_at(#name, directory, path, NULL));          \
        return REAL(name)(directory, path passed);               \
    }
ON_NAME(mkdir, COMMA mode_t mode, COMMA mode)
ON_NAME(rmdir, , )
ON_NAME(unlink, , )
ON_NAME(chmod, COMMA mode_t mode, COMMA mode)
ON_NAME(truncate, COMMA off_t size, COMMA size)
ON_NAME(truncate64, COMMA off64_t size, COMMA size)
ON_NAME_AT(mkdirat, COMMA mode_t mode, COMMA mode)
ON_NAME_AT(unlinkat, COMMA int flags, COMMA flags)
ON_NAME_AT(fchmodat, COMMA mode_t mode COMMA int flags, COMMA mode COMMA flags)

int symlink(const char *target, const char *path) {
    GUARD(change_at("symlink", AT_FDCWD, path, NULL));
    return REAL(symlink)(target, path);
}

int symlinkat(const char *target, int directory, const char *path) {
    GUARD(change_at("symlinkat", directory, path, NULL));
    return REAL(symlinkat)(target, directory, path);
}

/* --- calls on two names ------------------------------------------------------------------------------------------- */

int rename(const char *from, const char *to) {
    GUARD(change_two("rename", AT_FDCWD, from, AT_FDCWD, to));
    return REAL(rename)(from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to) {
    GUARD(change_two("renameat", from_at, from, to_at, to));
    return REAL(renameat)(from_at, from, to_at, to);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    if (armed && flags && set.plan.refuse_flags) return refused(EINVAL);
    GUARD(change_two("renameat2", from_at, from, to_at, to));
    return REAL(renameat2)(from_at, from, to_at, to, flags);
}

int link(const char *from, const char *to) {
    GUARD(change_two("link", AT_FDCWD, from, AT_FDCWD, to));
    return REAL(link)(from, to);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    GUARD(change_two("linkat", from_at, from, to_at, to));
    return REAL(linkat)(from_at, from, to_at, to, flags);
}

/* Python reaches renameat2 through here where its C library has no function of that name. */
long syscall(long number, ...) {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_renameat2)
        return renameat2((int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3], (unsigned)a[4]);
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
