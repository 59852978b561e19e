/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What a program can do with /dev/ummunotify, each part by its name: device PART. It knows nothing of how the device is there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/ummunotify.h>

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: errno %d\n", __FILE__, __LINE__, #condition, errno);     \
			exit(1);                                                                             \
		}                                                                                            \
	} while (0)
#define FAILS(call, error) CHECK((errno = 0, (call) == -1) && errno == (error))

enum { PAGE = 4096, PAGES = 4 };

static char *map_pages(void)
{
	char *start = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CHECK(start != MAP_FAILED);
	return start;
}

static int open_device(int flags)
{
	int fd = open("/dev/ummunotify", O_RDONLY | flags);
	CHECK(fd >= 0);
	return fd;
}

static const volatile __u64 *map_counter(int fd)
{
	const volatile __u64 *counter = mmap(NULL, sizeof *counter, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(counter != MAP_FAILED);
	return counter;
}

static int register_range(int fd, const void *start, size_t length, __u64 cookie)
{
	struct ummunotify_register_ioctl range = {
		.start = (uintptr_t)start,
		.end = (uintptr_t)start + length,
		.user_cookie = cookie,
	};
	return ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &range);
}

static int unregister(int fd, __u64 cookie)
{
	return ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, &cookie);
}

static struct ummunotify_event read_event(int fd)
{
	struct ummunotify_event event;
	CHECK(read(fd, &event, sizeof event) == sizeof event);
	return event;
}

static void expect_invalid(int fd, __u64 cookie, __u32 flags, const char *start, size_t length)
{
	struct ummunotify_event event = read_event(fd);
	CHECK(event.type == UMMUNOTIFY_EVENT_TYPE_INVAL);
	CHECK(event.user_cookie_counter == cookie);
	CHECK(event.flags == flags);
	CHECK(event.hint_start == (uintptr_t)start);
	CHECK(event.hint_end == (uintptr_t)start + length);
}

static void expect_last(int fd, __u64 counter)
{
	struct ummunotify_event event = read_event(fd);
	CHECK(event.type == UMMUNOTIFY_EVENT_TYPE_LAST);
	CHECK(event.user_cookie_counter == counter);
}

static int is_readable(int fd)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };
	int ready = poll(&poller, 1, 0);
	CHECK(ready == 0 || (ready == 1 && poller.revents == POLLIN));
	return ready;
}

static void opening(void)
{
	FAILS(open("/dev/ummunotify", O_RDWR), EINVAL);
	FAILS(open("/dev/ummunotify", O_WRONLY), EINVAL);
	FAILS(openat(AT_FDCWD, "/dev/ummunotify", O_RDWR), EINVAL);
	int first = open_device(O_CLOEXEC), second = open_device(0);
	CHECK(fcntl(first, F_GETFD) == FD_CLOEXEC && fcntl(second, F_GETFD) == 0);
	CHECK((fcntl(first, F_GETFL) & O_ACCMODE) == O_RDONLY);
	/* Each has ranges and a counter of its own. */
	const volatile __u64 *counters[] = { map_counter(first), map_counter(second) };
	char *start = map_pages();
	CHECK(register_range(first, start, PAGE, 1) == 0);
	CHECK(register_range(second, start + PAGE, PAGE, 1) == 0);
	munmap(start, PAGE);
	CHECK(*counters[0] == 1 && *counters[1] == 0);
	/* What is mapped outlives the descriptor. */
	CHECK(close(first) == 0);
	CHECK(*counters[0] == 1);
	FAILS(unregister(first, 1), EBADF);
	munmap(start + PAGE, PAGE);
	CHECK(*counters[1] == 1);
	/* Another file with the same number is another file. */
	CHECK(dup2(open("/dev/null", O_RDONLY), first) == first);
	char byte;
	CHECK(read(first, &byte, 1) == 0);
	FAILS(ioctl(first, UMMUNOTIFY_EXCHANGE_FEATURES, &byte), ENOTTY);
}

static void features(void)
{
	__u32 mask = ~0u;
	int fd = open_device(0);
	CHECK(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) == 0 && mask == 0);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask), EINVAL);
	fd = open_device(0);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, (void *)8), EFAULT);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask), EINVAL);
	/* Where it can be read but not written. */
	fd = open_device(0);
	void *fixed = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, fixed), EFAULT);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask), EINVAL);
	fd = open_device(O_NONBLOCK);
	struct ummunotify_event event;
	FAILS(read(fd, &event, sizeof event), EAGAIN);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask), EINVAL);
	fd = open_device(0);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	FAILS(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask), EINVAL);
	/* A look at the counter is no use. */
	fd = open_device(0);
	map_counter(fd);
	is_readable(fd);
	FAILS(unregister(fd, 1), EINVAL);
	/* Nor is a structure that is not there. */
	FAILS(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, (void *)8), EFAULT);
	CHECK(ioctl(fd, UMMUNOTIFY_EXCHANGE_FEATURES, &mask) == 0);
}

static void registering(void)
{
	int fd = open_device(0);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	FAILS(register_range(fd, start + PAGE, PAGE, 1), EINVAL);
	CHECK(register_range(fd, start, PAGE, 2) == 0);
	CHECK(register_range(fd, start + 100, PAGE, ~0ull) == 0);
	FAILS(register_range(fd, start + PAGE, -PAGE, 3), EINVAL);
	FAILS(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, (void *)8), EFAULT);
	FAILS(ioctl(fd, UMMUNOTIFY_UNREGISTER_REGION, (void *)8), EFAULT);
	FAILS(unregister(fd, 77), EINVAL);
	FAILS(ioctl(fd, _IO('U', 9), 0), ENOTTY);
	/* A structure of another size is another request. */
	FAILS(ioctl(fd, _IOW('U', 2, __u64), start), ENOTTY);
	/* What is reserved is not looked at. */
	struct ummunotify_register_ioctl range = {
		.start = (uintptr_t)start,
		.end = (uintptr_t)start + PAGE,
		.user_cookie = 4,
		.flags = ~0u,
		.reserved = ~0u,
	};
	CHECK(ioctl(fd, UMMUNOTIFY_REGISTER_REGION, &range) == 0);
	CHECK(unregister(fd, 1) == 0);
	FAILS(unregister(fd, 1), EINVAL);
	CHECK(register_range(fd, start, PAGE, 1) == 0);
}

static void mapping(void)
{
	int fd = open_device(0);
	CHECK(mmap(NULL, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, PAGE) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, -1, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	const volatile __u64 *counter = map_counter(fd), *again = map_counter(fd);
	CHECK(*counter == 0 && *again == 0);
	const volatile __u64 *private = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	CHECK(private != MAP_FAILED && *private == 0);
	CHECK(mprotect((void *)counter, PAGE, PROT_READ | PROT_WRITE) == -1);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGES * PAGE, 1) == 0);
	munmap(start, PAGE);
	CHECK(*counter == 1 && *again == 1 && *private == 1);
	madvise(start + PAGE, PAGE, MADV_DONTNEED);
	CHECK(*counter == 2 && *again == 2);
}

static void events(void)
{
	int fd = open_device(0);
	const volatile __u64 *counter = map_counter(fd);
	char *start = map_pages();
	/* A part: exactly that. */
	CHECK(register_range(fd, start, PAGES * PAGE, 1) == 0);
	CHECK(!is_readable(fd));
	madvise(start + PAGE, PAGE, MADV_DONTNEED);
	CHECK(is_readable(fd));
	expect_invalid(fd, 1, UMMUNOTIFY_EVENT_FLAG_HINT, start + PAGE, PAGE);
	CHECK(is_readable(fd));
	expect_last(fd, 1);
	CHECK(!is_readable(fd));
	/* Two parts: the whole. */
	madvise(start, PAGE, MADV_DONTNEED);
	madvise(start + 2 * PAGE, PAGE, MADV_DONTNEED);
	CHECK(*counter == 3);
	expect_invalid(fd, 1, 0, start, PAGES * PAGE);
	expect_last(fd, 3);
	/* To the byte. */
	CHECK(register_range(fd, start + PAGE + 100, 10, 2) == 0);
	CHECK(unregister(fd, 1) == 0);
	madvise(start + PAGE, PAGE, MADV_DONTNEED);
	expect_invalid(fd, 2, UMMUNOTIFY_EVENT_FLAG_HINT, start + PAGE + 100, 10);
	expect_last(fd, 4);
	/* Several ranges at once; as many events as there is room for. */
	CHECK(register_range(fd, start, PAGES * PAGE, 3) == 0);
	madvise(start, PAGES * PAGE, MADV_DONTNEED);
	CHECK(*counter == 5);
	struct ummunotify_event all[5];
	memset(all, 0xff, sizeof all);
	CHECK(read(fd, all, sizeof all) == 3 * sizeof *all);
	CHECK(all[0].user_cookie_counter + all[1].user_cookie_counter == 5);
	CHECK(all[2].type == UMMUNOTIFY_EVENT_TYPE_LAST && all[2].user_cookie_counter == 5);
	CHECK(all[3].type == ~0u);
	madvise(start, PAGES * PAGE, MADV_DONTNEED);
	CHECK(read(fd, all, 2 * sizeof *all) == 2 * sizeof *all);
	CHECK(all[1].type == UMMUNOTIFY_EVENT_TYPE_INVAL);
	CHECK(read(fd, all, sizeof *all - 1) == 0);
	expect_last(fd, 6);
	/* In parts of a vector. */
	madvise(start, PAGES * PAGE, MADV_DONTNEED);
	struct iovec parts[] = { { &all[0], sizeof *all }, { &all[1], 3 * sizeof *all } };
	CHECK(readv(fd, parts, 2) == 3 * sizeof *all);
	/* Nothing of a range that is unregistered, though it was hit. */
	madvise(start, PAGES * PAGE, MADV_DONTNEED);
	CHECK(unregister(fd, 2) == 0 && unregister(fd, 3) == 0);
	CHECK(!is_readable(fd));
	CHECK(*counter == 8);
	munmap(start, PAGES * PAGE);
	CHECK(*counter == 8 && !is_readable(fd));
}

static void bad_buffers(void)
{
	int fd = open_device(0);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	munmap(start, PAGE);
	/* Not known to the compiler, which would not believe it. */
	void *volatile nowhere = (void *)8;
	FAILS(read(fd, nowhere, sizeof(struct ummunotify_event)), EFAULT);
	/* The event is lost by that. */
	expect_last(fd, 1);
	CHECK(!is_readable(fd));
	/* There is nothing for which there is room, but something to read. */
	struct ummunotify_event event;
	start = map_pages();
	CHECK(register_range(fd, start, PAGE, 2) == 0);
	munmap(start, PAGE);
	CHECK(read(fd, &event, sizeof event - 1) == 0 && read(fd, &event, 0) == 0);
	CHECK(fcntl(fd, F_SETFL, O_NONBLOCK) == 0);
	expect_invalid(fd, 2, UMMUNOTIFY_EVENT_FLAG_HINT, start, PAGE);
	expect_last(fd, 2);
	FAILS(read(fd, &event, 0), EAGAIN);
}

/* However much room there is, a read gives no more than a page of events. */
static void many(void)
{
	enum { RANGES = 200, MOST = 4096 / sizeof(struct ummunotify_event) };
	int fd = open_device(0);
	char *start = map_pages();
	for (int cookie = 0; cookie < RANGES; cookie++)
		CHECK(register_range(fd, start, PAGE, cookie) == 0);
	madvise(start, PAGE, MADV_DONTNEED);
	struct ummunotify_event all[2 * RANGES];
	CHECK(read(fd, all, sizeof all) == MOST * sizeof *all);
	CHECK(read(fd, all + MOST, sizeof all / 2) == (RANGES - MOST + 1) * sizeof *all);
	char seen[RANGES] = { 0 };
	for (int i = 0; i < RANGES; i++) {
		CHECK(all[i].type == UMMUNOTIFY_EVENT_TYPE_INVAL && all[i].user_cookie_counter < RANGES);
		CHECK(!seen[all[i].user_cookie_counter]++);
	}
	CHECK(all[RANGES].type == UMMUNOTIFY_EVENT_TYPE_LAST && all[RANGES].user_cookie_counter == 1);
}

/* A device is its process'; a child made by fork does not have it, nor does it take it away from the parent. */
static void forked(void)
{
	int fd = open_device(0);
	char *start = map_pages();
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		struct ummunotify_event event;
		FAILS(register_range(fd, start, PAGE, 1), ENODEV);
		FAILS(unregister(fd, 1), ENODEV);
		FAILS(read(fd, &event, sizeof event), ENODEV);
		CHECK(close(fd) == 0);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0);
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	munmap(start, PAGE);
	expect_invalid(fd, 1, UMMUNOTIFY_EVENT_FLAG_HINT, start, PAGE);
	expect_last(fd, 1);
}

static char *waited_for;

/* Drops the page and leaves the address mapped: unmapped, it would be anybody's, say for the stack of a thread. */
static void drop(void *start)
{
	CHECK(madvise(start, PAGE, MADV_DONTNEED) == 0);
}

static void *drop_later(void *unused)
{
	(void)unused;
	drop(waited_for);
	return NULL;
}

static void waiting(void)
{
	int fd = open_device(0), poller = epoll_create1(0);
	struct epoll_event interest = { .events = EPOLLIN, .data.fd = fd }, ready;
	CHECK(epoll_ctl(poller, EPOLL_CTL_ADD, fd, &interest) == 0);
	CHECK(epoll_wait(poller, &ready, 1, 0) == 0);
	for (int way = 0; way < 4; way++) {
		waited_for = map_pages();
		CHECK(register_range(fd, waited_for, PAGE, way) == 0);
		pthread_t other;
		CHECK(pthread_create(&other, NULL, drop_later, NULL) == 0);
		struct pollfd descriptor = { .fd = fd, .events = POLLIN };
		fd_set set;
		FD_ZERO(&set);
		FD_SET(fd, &set);
		switch (way) {
		case 0:
			break; /* read itself waits */
		case 1:
			CHECK(poll(&descriptor, 1, -1) == 1);
			break;
		case 2:
			CHECK(epoll_wait(poller, &ready, 1, -1) == 1 && ready.data.fd == fd);
			break;
		case 3:
			CHECK(select(fd + 1, &set, NULL, NULL, NULL) == 1);
			break;
		}
		expect_invalid(fd, way, UMMUNOTIFY_EVENT_FLAG_HINT, waited_for, PAGE);
		expect_last(fd, way + 1);
		CHECK(pthread_join(other, NULL) == 0);
		CHECK(unregister(fd, way) == 0);
	}
	/* Not at all, by each of the ways to say so. */
	struct ummunotify_event event;
	CHECK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0);
	CHECK(fcntl(fd, F_GETFL) & O_NONBLOCK);
	FAILS(read(fd, &event, sizeof event), EAGAIN);
	int off = 0, on = 1;
	CHECK(ioctl(fd, FIONBIO, &off) == 0 && !(fcntl(fd, F_GETFL) & O_NONBLOCK));
	CHECK(ioctl(fd, FIONBIO, &on) == 0);
	FAILS(read(fd, &event, sizeof event), EAGAIN);
}

static void nothing(int signal)
{
	(void)signal;
}

static void interrupted(void)
{
	int fd = open_device(0);
	struct sigaction action = { .sa_handler = nothing };
	struct ummunotify_event event;
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	struct itimerval soon = { .it_interval = { 0, 10000 }, .it_value = { 0, 10000 } };
	CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
	FAILS(read(fd, &event, sizeof event), EINTR);
	/* Opening works while signals come. */
	close(open_device(0));
	struct itimerval never = { 0 };
	CHECK(setitimer(ITIMER_REAL, &never, NULL) == 0);
}

static void signals(void)
{
	int fd = open_device(O_NONBLOCK);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGIO);
	sigaddset(&set, SIGUSR1);
	CHECK(pthread_sigmask(SIG_BLOCK, &set, NULL) == 0);
	CHECK(fcntl(fd, F_SETOWN, getpid()) == 0);
	CHECK(fcntl(fd, F_SETFL, O_NONBLOCK | O_ASYNC) == 0);
	CHECK(fcntl(fd, F_GETFL) & O_ASYNC);
	for (int round = 0; round < 3; round++) {
		char *start = map_pages();
		CHECK(register_range(fd, start, PAGE, 1) == 0);
		drop(start);
		CHECK(sigwaitinfo(&set, NULL) == SIGIO);
		expect_invalid(fd, 1, UMMUNOTIFY_EVENT_FLAG_HINT, start, PAGE);
		expect_last(fd, round + 1);
		CHECK(unregister(fd, 1) == 0);
	}
	CHECK(fcntl(fd, F_SETSIG, SIGUSR1) == 0);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	drop(start);
	/* After one of the other that was on its way: there is one too when an event is left to be read. */
	int signal = sigwaitinfo(&set, NULL);
	CHECK((signal == SIGIO ? sigwaitinfo(&set, NULL) : signal) == SIGUSR1);
	int off = 0;
	CHECK(ioctl(fd, FIOASYNC, &off) == 0 && !(fcntl(fd, F_GETFL) & O_ASYNC));
	CHECK(close(fd) == 0);
}

static void duplicates(void)
{
	int fd = open_device(0), copies[] = { dup(fd), dup2(fd, 500), dup3(fd, 501, O_CLOEXEC), fcntl(fd, F_DUPFD, 600) };
	CHECK(copies[1] == 500 && copies[2] == 501 && copies[3] == 600);
	CHECK(fcntl(501, F_GETFD) == FD_CLOEXEC);
	char *start = map_pages();
	CHECK(register_range(fd, start, PAGE, 1) == 0);
	CHECK(close(fd) == 0);
	munmap(start, PAGE);
	expect_invalid(copies[0], 1, UMMUNOTIFY_EVENT_FLAG_HINT, start, PAGE);
	expect_last(copies[3], 1);
	FAILS(register_range(copies[1], start, PAGE, 1), EINVAL);
	for (int i = 0; i < 4; i++)
		CHECK(close(copies[i]) == 0);
	FAILS(unregister(copies[1], 1), EBADF);
	/* A file put in its place is no device. */
	fd = open_device(0);
	int null = open("/dev/null", O_RDONLY);
	CHECK(dup2(null, fd) == fd);
	FAILS(unregister(fd, 1), ENOTTY);
}

static const struct {
	const char *name;
	void (*run)(void);
} parts[] = {
	{ "opening", opening },         { "features", features }, { "registering", registering },
	{ "mapping", mapping },         { "events", events },     { "bad-buffers", bad_buffers },
	{ "waiting", waiting },         { "interrupted", interrupted },
	{ "signals", signals },         { "duplicates", duplicates },
	{ "many", many },               { "forked", forked },
};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
		if (argc < 2 || strcmp(argv[1], parts[i].name) == 0) {
			parts[i].run();
			printf("%s: ok\n", parts[i].name);
		}
	}
	return 0;
}
