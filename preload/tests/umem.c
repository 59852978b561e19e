/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * What programs can do with /dev/umem, each part by its name: umem PART. They know nothing of how the device is there.
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
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/umem.h>

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: errno %d\n", __FILE__, __LINE__, #condition, errno);     \
			_exit(1);                                                                            \
		}                                                                                            \
	} while (0)
#define FAILS(call, error) CHECK((errno = 0, (call) == -1) && errno == (error))

enum { PAGE = 4096 };

/* Where nothing is, which the compiler does not know. */
static void *volatile nowhere = (void *)8;

struct device {
	int fd, shmem;
	size_t size;
	unsigned char *window;
};

static int open_device(int flags)
{
	int fd = open("/dev/umem", O_RDWR | flags);
	CHECK(fd >= 0);
	return fd;
}

static struct device make(size_t pages, int flags)
{
	struct device device = { .fd = open_device(flags) };
	struct umem_init init = { .size = pages * PAGE - 1 };
	CHECK(ioctl(device.fd, UMEM_INIT, &init) == 0);
	CHECK(init.size == pages * PAGE);
	device.shmem = init.shmem_fd;
	device.size = init.size;
	CHECK(ftruncate(device.shmem, device.size) == 0);
	device.window = mmap(NULL, device.size, PROT_READ | PROT_WRITE, MAP_SHARED, device.shmem, 0);
	CHECK(device.window != MAP_FAILED);
	return device;
}

static unsigned char *map(struct device *device)
{
	unsigned char *memory = mmap(NULL, device->size, PROT_READ | PROT_WRITE, MAP_PRIVATE, device->fd, 0);
	CHECK(memory != MAP_FAILED);
	return memory;
}

static unsigned char value(uint64_t page)
{
	return 1 + page % 255;
}

static void fill(struct device *device, uint64_t page)
{
	memset(device->window + page * PAGE, value(page), PAGE);
}

static void serve(struct device *device, uint64_t page)
{
	fill(device, page);
	CHECK(write(device->fd, &page, sizeof page) == sizeof page);
}

static void expect(const unsigned char *memory, uint64_t page)
{
	const volatile unsigned char *bytes = memory + page * PAGE;
	CHECK(bytes[0] == value(page) && bytes[PAGE - 1] == value(page));
}

/* Serves so many requests, and gives back the memory that it has used for each. */
static void serve_requests(struct device *device, uint64_t count)
{
	uint64_t pages[64];
	while (count > 0) {
		ssize_t length = read(device->fd, pages, sizeof pages);
		CHECK(length > 0 && length % sizeof *pages == 0);
		size_t asked = length / sizeof *pages;
		for (size_t at = 0; at < asked; at++)
			fill(device, pages[at]);
		CHECK(write(device->fd, pages, length) == length);
		for (size_t at = 0; at < asked; at++)
			CHECK(madvise(device->window + pages[at] * PAGE, PAGE, MADV_REMOVE) == 0);
		count -= asked;
	}
}

static int is_readable(int fd)
{
	struct pollfd poller = { .fd = fd, .events = POLLIN };
	CHECK(poll(&poller, 1, 0) >= 0);
	return poller.revents == POLLIN;
}

/* What it says is what the child ended with: a code, or minus a signal. */
static int end_of(pid_t child)
{
	int status;
	CHECK(waitpid(child, &status, 0) == child);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec * 1e-9;
}

static void *touch(void *page)
{
	(void)*(volatile unsigned char *)page;
	return NULL;
}

static void opening(void)
{
	int fd = open_device(O_CLOEXEC | O_NONBLOCK);
	CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC);
	CHECK((fcntl(fd, F_GETFL) & (O_ACCMODE | O_NONBLOCK)) == (O_RDWR | O_NONBLOCK));
	CHECK(fcntl(fd, F_SETFL, 0) == 0 && (fcntl(fd, F_GETFL) & O_NONBLOCK) == 0);
	uint64_t page = 0;
	/* Before it is initialised. */
	FAILS(read(fd, &page, sizeof page), ENXIO);
	FAILS(write(fd, &page, sizeof page), ENXIO);
	FAILS(ioctl(fd, UMEM_MAKE_VMA_ANONYMOUS), ENXIO);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == ENXIO);
	CHECK(!is_readable(fd));
	FAILS(ioctl(fd, UMEM_INIT, NULL), EFAULT);
	FAILS(ioctl(fd, _IO(UMEMIO, 2)), EINVAL);
	FAILS(ioctl(fd, _IO('U', 0)), EINVAL);
	struct umem_init init = { .size = 0 };
	FAILS(ioctl(fd, UMEM_INIT, &init), EINVAL);
	init.size = ~0ull;
	FAILS(ioctl(fd, UMEM_INIT, &init), ENOMEM);
	init.size = 1;
	CHECK(ioctl(fd, UMEM_INIT, &init) == 0 && init.size == PAGE);
	CHECK(fcntl(init.shmem_fd, F_GETFD) == 0);
	FAILS(ioctl(fd, UMEM_INIT, &init), EBUSY);
	init.size = 0;
	FAILS(ioctl(fd, UMEM_INIT, &init), EINVAL);
	CHECK(close(fd) == 0);
	FAILS(read(fd, &page, sizeof page), EBADF);
	/* As a file that is open for one of the two. */
	fd = open("/dev/umem", O_RDONLY);
	init.size = 1;
	CHECK(ioctl(fd, UMEM_INIT, &init) == 0 && (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDONLY);
	FAILS(write(fd, &page, sizeof page), EBADF);
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	fd = open("/dev/umem", O_WRONLY);
	CHECK(ioctl(fd, UMEM_INIT, &init) == 0);
	FAILS(read(fd, &page, sizeof page), EBADF);
	CHECK(mmap(NULL, PAGE, PROT_WRITE, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == EACCES);
}

static void buffers(void)
{
	struct device device = make(8, O_NONBLOCK);
	uint64_t pages[4096];
	FAILS(read(device.fd, pages, 7), EINVAL);
	FAILS(write(device.fd, pages, 7), EINVAL);
	FAILS(read(device.fd, pages, 0), EINVAL);
	FAILS(write(device.fd, pages, 0), EINVAL);
	FAILS(read(device.fd, pages, 8), EAGAIN);
	FAILS(write(device.fd, nowhere, 8), EFAULT);
	unsigned char *memory = map(&device);
	pthread_t threads[8];
	for (int at = 0; at < 8; at++)
		CHECK(pthread_create(&threads[at], NULL, touch, memory + at * PAGE) == 0);
	while (!is_readable(device.fd))
		sched_yield();
	/* One and a half come as one; the rest in one read that has room for thousands. */
	CHECK(read(device.fd, pages, 12) == 8);
	size_t got = 1;
	while (got < 8) {
		ssize_t length = read(device.fd, pages + got, sizeof pages - got * 8);
		if (length < 0)
			CHECK(errno == EAGAIN);
		else
			got += length / 8;
	}
	FAILS(read(device.fd, pages, sizeof pages), EAGAIN);
	unsigned seen = 0;
	for (int at = 0; at < 8; at++) {
		seen |= 1u << pages[at];
		fill(&device, at);
	}
	CHECK(seen == 0xff);
	/* The same and others, over and over, in a buffer that is no multiple of 8. */
	for (int at = 0; at < 4096; at++)
		pages[at] = at * 5 % 8;
	struct iovec parts[] = { { pages, 16 }, { pages + 2, sizeof pages - 16 } };
	CHECK(writev(device.fd, parts, 2) == sizeof pages);
	CHECK(write(device.fd, pages, 21) == 16);
	for (int at = 0; at < 8; at++) {
		CHECK(pthread_join(threads[at], NULL) == 0);
		expect(memory, at);
	}
	/* Beyond the end, after one that is not. */
	uint64_t beyond[] = { 0, 8 };
	FAILS(write(device.fd, beyond, sizeof beyond), EINVAL);
	beyond[0] = ~0ull;
	FAILS(write(device.fd, beyond, 8), EINVAL);
	/* A request that has nowhere to go is lost, as it was. */
	CHECK(munmap(memory, device.size) == 0);
}

static void mapping(void)
{
	struct device device = make(8, 0);
	CHECK(mmap(NULL, 9 * PAGE, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 8 * PAGE) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 5) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EINVAL);
	/* A part, where the program wants it, and by a duplicate. */
	char *place = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int other = dup(device.fd);
	unsigned char *memory =
		mmap(place, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, other, 2 * PAGE);
	CHECK((char *)memory == place);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EBUSY);
	CHECK(close(device.fd) == 0);
	device.fd = other;
	for (uint64_t page = 0; page < 8; page++)
		serve(&device, page);
	for (uint64_t page = 2; page < 5; page++)
		expect(memory - 2 * PAGE, page);
	CHECK(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS) == 0);
	CHECK(munmap(memory, 3 * PAGE) == 0);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EBUSY);
}

/* The seed's flow, with what is waited for in place of its sleeps. */
static void flow(void)
{
	struct device device = make(8, 0);
	pid_t server = fork();
	CHECK(server >= 0);
	if (server == 0) {
		CHECK(close(device.shmem) == 0);
		unsigned char fill = 1;
		uint64_t page = 0;
		memset(device.window, fill++, PAGE);
		CHECK(write(device.fd, &page, sizeof page) == sizeof page);
		for (int served = 1; served < 8; served++) {
			CHECK(read(device.fd, &page, sizeof page) == sizeof page);
			memset(device.window + page * PAGE, fill++, PAGE);
			CHECK(write(device.fd, &page, sizeof page) == sizeof page);
			CHECK(madvise(device.window + page * PAGE, PAGE, MADV_REMOVE) == 0);
		}
		while (ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS) != 0)
			CHECK(errno == EBUSY);
		CHECK(munmap(device.window, device.size) == 0);
		CHECK(close(device.fd) == 0);
		_exit(0);
	}
	CHECK(munmap(device.window, device.size) == 0);
	CHECK(close(device.shmem) == 0);
	unsigned char *memory = map(&device);
	CHECK(close(device.fd) == 0);
	const int order[] = { 7, 1, 6, 2, 5, 3, 4 };
	for (int at = 0; at < 7; at++)
		CHECK(*(volatile unsigned char *)(memory + order[at] * PAGE) == at + 2);
	CHECK(*(volatile unsigned char *)memory == 1);
	CHECK(end_of(server) == 0);
	/* It is ordinary memory. */
	for (int at = 0; at < 7; at++)
		CHECK(memory[order[at] * PAGE] == at + 2);
	CHECK(madvise(memory, PAGE, MADV_DONTNEED) == 0 && memory[0] == 0);
	pid_t child = fork();
	if (child == 0)
		_exit(memory[7 * PAGE] == 2 ? 0 : 1);
	/* But not for children: that was said when it was mapped. */
	CHECK(end_of(child) == -SIGSEGV);
}

static void fork_before_mapping(void)
{
	/* The child is the client. */
	struct device device = make(64, 0);
	pid_t client = fork();
	if (client == 0) {
		unsigned char *memory = map(&device);
		for (uint64_t page = 0; page < 64; page++)
			expect(memory, page);
		_exit(0);
	}
	serve_requests(&device, 64);
	CHECK(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS) == 0 || errno == EBUSY);
	CHECK(end_of(client) == 0);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EBUSY);
}

static void fork_after_mapping(void)
{
	struct device device = make(64, 0);
	unsigned char *memory = map(&device);
	pid_t child = fork();
	if (child == 0) {
		/* The memory is not there. The device is. */
		CHECK(msync(memory, PAGE, MS_ASYNC) == -1 && errno == ENOMEM);
		CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, device.fd, 0) == MAP_FAILED && errno == EBUSY);
		serve_requests(&device, 64);
		_exit(0);
	}
	for (uint64_t page = 0; page < 64; page++)
		expect(memory, page);
	CHECK(end_of(child) == 0);
}

static void polling(void)
{
	struct device device = make(16, 0);
	unsigned char *memory = map(&device);
	int epoll = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN | EPOLLET };
	CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, device.fd, &event) == 0);
	for (uint64_t page = 0; page < 16; page++) {
		CHECK(!is_readable(device.fd) && epoll_wait(epoll, &event, 1, 0) == 0);
		pthread_t thread;
		CHECK(pthread_create(&thread, NULL, touch, memory + page * PAGE) == 0);
		struct pollfd poller = { .fd = device.fd, .events = POLLIN };
		CHECK(poll(&poller, 1, 60000) == 1 && poller.revents == POLLIN);
		CHECK(epoll_wait(epoll, &event, 1, 60000) == 1 && event.events == EPOLLIN);
		/* One wake-up for one request. */
		CHECK(epoll_wait(epoll, &event, 1, 0) == 0 && is_readable(device.fd));
		uint64_t asked;
		CHECK(read(device.fd, &asked, sizeof asked) == sizeof asked && asked == page);
		CHECK(!is_readable(device.fd));
		serve(&device, page);
		CHECK(pthread_join(thread, NULL) == 0);
	}
}

static volatile sig_atomic_t alarmed;

static void on_alarm(int signal)
{
	(void)signal;
	alarmed = 1;
}

static void signals(void)
{
	struct device device = make(1, 0);
	struct sigaction action = { .sa_handler = on_alarm };
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	unsigned char *memory = map(&device);
	struct itimerval soon = { .it_value.tv_usec = 1000, .it_interval.tv_usec = 1000 };
	CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
	uint64_t page;
	FAILS(read(device.fd, &page, sizeof page), EINTR);
	CHECK(alarmed);
	soon = (struct itimerval){ 0 };
	CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
	CHECK(munmap(memory, PAGE) == 0);
}

static void *look_at_all(void *memory)
{
	for (uint64_t at = 0; at < 1024; at++)
		expect(memory, at * 37 % 1024);
	return NULL;
}

static void many_threads(void)
{
	struct device device = make(1024, 0);
	pid_t server = fork();
	if (server == 0) {
		serve_requests(&device, 1024);
		_exit(0);
	}
	unsigned char *memory = map(&device);
	pthread_t threads[64];
	for (int at = 0; at < 64; at++)
		CHECK(pthread_create(&threads[at], NULL, look_at_all, memory) == 0);
	for (int at = 0; at < 64; at++)
		CHECK(pthread_join(threads[at], NULL) == 0);
	/* Each was asked for once, or the server would not have ended with the last. */
	CHECK(end_of(server) == 0);
}

/* The client waits for a page while the server is killed. closes: whether it has kept the device open. */
static void killed_server_of(int closes)
{
	struct device device = make(4, 0);
	pid_t client = fork();
	if (client == 0) {
		int started[2];
		CHECK(pipe(started) == 0);
		pid_t server = fork();
		if (server == 0) {
			uint64_t page;
			serve(&device, 1);
			CHECK(read(device.fd, &page, sizeof page) == sizeof page && page == 2);
			CHECK(write(started[1], "", 1) == 1);
			pause();
		}
		unsigned char *memory = map(&device);
		if (closes)
			CHECK(close(device.fd) == 0);
		pthread_t thread;
		CHECK(pthread_create(&thread, NULL, touch, memory + 2 * PAGE) == 0);
		char byte;
		CHECK(read(started[0], &byte, 1) == 1);
		expect(memory, 1);
		CHECK(kill(server, SIGKILL) == 0);
		CHECK(pthread_join(thread, NULL) == 0);
		_exit(2);
	}
	/* Nobody but its own process has it now. */
	CHECK(close(device.fd) == 0);
	int end = end_of(client);
	CHECK(end == -SIGBUS || end == -SIGSEGV);
}

static void killed_server(void)
{
	killed_server_of(1);
	killed_server_of(0);
}

static void one_of_two_servers_killed(void)
{
	struct device device = make(2, 0);
	int started[2];
	CHECK(pipe(started) == 0);
	pid_t first = fork();
	if (first == 0) {
		uint64_t page;
		CHECK(read(device.fd, &page, sizeof page) == sizeof page);
		CHECK(write(started[1], "", 1) == 1);
		pause();
	}
	unsigned char *memory = map(&device);
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, touch, memory) == 0);
	char byte;
	CHECK(read(started[0], &byte, 1) == 1);
	/* It has the request, and dies with it. The second one begins to serve before that. */
	pid_t second = fork();
	if (second == 0) {
		serve(&device, 1);
		CHECK(write(started[1], "", 1) == 1);
		serve_requests(&device, 1);
		_exit(0);
	}
	CHECK(read(started[0], &byte, 1) == 1);
	CHECK(kill(first, SIGKILL) == 0 && end_of(first) == -SIGKILL);
	CHECK(pthread_join(thread, NULL) == 0);
	expect(memory, 0);
	CHECK(end_of(second) == 0);
}

static void killed_client(void)
{
	struct device device = make(4, 0);
	int held[2];
	CHECK(pipe(held) == 0);
	pid_t client = fork();
	if (client == 0) {
		unsigned char *memory = map(&device);
		/* A child of it outlives it, until this part ends, and makes no difference. */
		if (fork() == 0) {
			char byte;
			close(device.fd);
			close(held[1]);
			_exit(read(held[0], &byte, 1) == 0 ? 0 : 1);
		}
		touch(memory);
		_exit(2);
	}
	uint64_t page;
	CHECK(read(device.fd, &page, sizeof page) == sizeof page && page == 0);
	CHECK(kill(client, SIGKILL) == 0);
	CHECK(end_of(client) == -SIGKILL);
	/* No more requests, ever; what is written then is nobody's. */
	CHECK(read(device.fd, &page, sizeof page) == 0);
	for (page = 0; page < 4; page++)
		serve(&device, page);
	CHECK(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS) == 0);
}

static void core_dump(void)
{
	char directory[] = "/tmp/umem-core-XXXXXX";
	CHECK(mkdtemp(directory) != NULL);
	struct device device = make(4096, 0);
	pid_t client = fork();
	if (client == 0) {
		CHECK(chdir(directory) == 0);
		struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
		setrlimit(RLIMIT_CORE, &unlimited);
		unsigned char *memory = map(&device);
		pthread_t thread;
		CHECK(pthread_create(&thread, NULL, touch, memory + 5 * PAGE) == 0);
		touch(memory + 7 * PAGE);
		abort();
	}
	/* One of the two pages is served, the other is waited for while the client dumps core. */
	uint64_t pages[2];
	for (int at = 0; at < 2; at++)
		CHECK(read(device.fd, &pages[at], sizeof *pages) == sizeof *pages);
	CHECK(pages[0] + pages[1] == 12);
	double start = now();
	serve(&device, 7);
	CHECK(end_of(client) == -SIGABRT);
	double seconds = now() - start;
	printf("core dump: %.3f s\n", seconds);
	CHECK(seconds < 1);
	char command[64];
	snprintf(command, sizeof command, "rm -rf %s", directory);
	CHECK(system(command) == 0);
}

static void anonymous(void)
{
	struct device device = make(16, 0);
	FAILS(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS), EBUSY);
	unsigned char *memory = map(&device);
	for (uint64_t page = 0; page < 16; page++) {
		FAILS(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS), EBUSY);
		serve(&device, page);
	}
	CHECK(ioctl(device.fd, UMEM_MAKE_VMA_ANONYMOUS) == 0);
	CHECK(close(device.fd) == 0 && close(device.shmem) == 0 && munmap(device.window, device.size) == 0);
	for (uint64_t page = 0; page < 16; page++)
		expect(memory, page);
	/* Neither descriptor nor thread is left. */
	CHECK(system("test -z \"$(ls -l /proc/$PPID/fd | grep userfaultfd)\"") == 0);
	while (system("test -z \"$(ls -l /proc/$PPID/fd | grep -e umem -e eventfd)\"") != 0)
		sched_yield();
	while (system("test $(ls /proc/$PPID/task | wc -l) = 1") != 0)
		sched_yield();
	CHECK(munmap(memory, device.size) == 0);
}

static const struct {
	const char *name;
	void (*run)(void);
} parts[] = {
	{ "opening", opening },
	{ "buffers", buffers },
	{ "mapping", mapping },
	{ "flow", flow },
	{ "fork before mapping", fork_before_mapping },
	{ "fork after mapping", fork_after_mapping },
	{ "polling", polling },
	{ "signals", signals },
	{ "many threads", many_threads },
	{ "killed server", killed_server },
	{ "one of two servers killed", one_of_two_servers_killed },
	{ "killed client", killed_client },
	{ "core dump", core_dump },
	{ "anonymous", anonymous },
};

int main(int argc, char **argv)
{
	for (size_t at = 0; at < sizeof parts / sizeof *parts; at++) {
		if (argc > 1 && strcmp(argv[1], parts[at].name) != 0)
			continue;
		/* Each in a process of its own, which a test that hangs does not outlive. */
		pid_t part = fork();
		CHECK(part >= 0);
		if (part == 0) {
			alarm(50);
			parts[at].run();
			fflush(stdout);
			_exit(0);
		}
		int end = end_of(part);
		if (end != 0) {
			fprintf(stderr, "%s: ended with %d\n", parts[at].name, end);
			return 1;
		}
		printf("%s: ok\n", parts[at].name);
		fflush(stdout);
	}
	return 0;
}
