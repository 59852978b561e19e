/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Every function of umem.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <umem.h>

#define CHECK(condition)                                                                                     \
	do {                                                                                                 \
		if (!(condition)) {                                                                          \
			fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #condition,                   \
				umem_last_error());                                                          \
			_exit(1);                                                                            \
		}                                                                                            \
	} while (0)

enum { PAGE = 4096, PAGES = 16 };

static void serve(struct umem_device *device)
{
	uint64_t pages[PAGES];
	unsigned char *window = umem_window(device);
	CHECK(window != NULL && window == umem_window(device));
	ssize_t count;
	while ((count = umem_read(device, pages, PAGES)) > 0) {
		for (ssize_t at = 0; at < count; at++)
			memset(window + pages[at] * PAGE, 1 + (int)pages[at], PAGE);
		CHECK(umem_write(device, pages, count) == count);
	}
	CHECK(count == 0);
}

static void *serve_in_thread(void *device)
{
	serve(device);
	return NULL;
}

static void look(const unsigned char *memory)
{
	for (int page = 0; page < PAGES; page++)
		CHECK(((const volatile unsigned char *)memory)[page * PAGE] == 1 + page);
}

static int ended_well(pid_t child)
{
	int status;
	return waitpid(child, &status, 0) == child && status == 0;
}

static void in_one_process(uint32_t flags)
{
	struct umem_device *device;
	CHECK(umem_create(PAGES * PAGE - 1, UMEM_DRIVER_REQUESTS, flags, &device) == 0);
	CHECK(umem_size(device) == PAGES * PAGE);
	CHECK(umem_make_anonymous(device) == -EBUSY);
	CHECK(strcmp(umem_last_error(), "not every page is there yet") == 0);
	void *memory, *other;
	CHECK(umem_map(device, &memory) == 0);
	CHECK(umem_map(device, &other) == -EBUSY);
	pthread_t server;
	CHECK(pthread_create(&server, NULL, serve_in_thread, device) == 0);
	look(memory);
	/* Until the write that brought the last page has returned. */
	int made;
	while ((made = umem_make_anonymous(device)) == -EBUSY)
		sched_yield();
	CHECK(made == 0);
	CHECK(pthread_join(server, NULL) == 0);
	umem_close(device);
	look(memory);
	CHECK(munmap(memory, PAGES * PAGE) == 0);
}

static void by_fork(void)
{
	struct umem_device *device;
	CHECK(umem_create(PAGES * PAGE, 1, 0, &device) == 0);
	pid_t server = fork();
	if (server == 0) {
		umem_drop(device, UMEM_CLIENT);
		serve(device);
		umem_close(device);
		_exit(0);
	}
	pid_t client = fork();
	if (client == 0) {
		umem_drop(device, UMEM_SERVER);
		uint64_t page = 0;
		CHECK(umem_read(device, &page, 1) == -ENXIO && umem_fd(device) == -ENXIO);
		CHECK(umem_window(device) == NULL && umem_size(device) == PAGES * PAGE);
		void *memory;
		CHECK(umem_map(device, &memory) == 0);
		umem_close(device);
		look(memory);
		/* A child of the client does not keep it from having ended. */
		pid_t child = fork();
		if (child == 0)
			_exit(0);
		CHECK(ended_well(child));
		_exit(0);
	}
	umem_close(device);
	CHECK(ended_well(client) && ended_well(server));
}

static void by_socket(void)
{
	int sockets[2];
	CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0);
	pid_t server = fork();
	struct umem_device *device;
	if (server == 0) {
		CHECK(umem_receive(sockets[1], UMEM_SERVER, &device) == 0);
		serve(device);
		_exit(0);
	}
	CHECK(umem_create(PAGES * PAGE, 1, 0, &device) == 0);
	CHECK(umem_send(device, sockets[0], 3) == -EINVAL);
	CHECK(umem_send(device, sockets[0], UMEM_SERVER) == 0);
	umem_drop(device, UMEM_SERVER);
	CHECK(umem_send(device, sockets[0], UMEM_SERVER) == -ENXIO);
	/* The client half goes to another process too. */
	int others[2];
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, others) == 0);
	pid_t client = fork();
	if (client == 0) {
		umem_close(device);
		CHECK(umem_receive(others[1], UMEM_CLIENT, &device) == 0);
		void *memory;
		CHECK(umem_map(device, &memory) == 0);
		look(memory);
		_exit(0);
	}
	CHECK(umem_send(device, others[0], UMEM_CLIENT) == 0);
	umem_close(device);
	CHECK(ended_well(client) && ended_well(server));
}

static void by_hand(void)
{
	struct umem_device *device;
	CHECK(umem_create(0, 1, 0, &device) == -EINVAL && umem_create(1, 1, 2, &device) == -EINVAL);
	CHECK(umem_create(PAGES * PAGE, 1, 0, &device) == 0);
	CHECK(fcntl(umem_fd(device), F_SETFL, O_NONBLOCK) == 0);
	uint64_t page = 3;
	CHECK(umem_read(device, &page, 1) == -EAGAIN && umem_read(device, &page, 0) == -EINVAL);
	unsigned char content[PAGE];
	memset(content, 4, PAGE);
	CHECK(pwrite(umem_window_fd(device), content, PAGE, 3 * PAGE) == PAGE);
	CHECK(umem_write(device, &page, 1) == 1 && umem_write(device, &page, 0) == -EINVAL);
	void *memory;
	CHECK(umem_map(device, &memory) == 0);
	unsigned char *own = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(own != MAP_FAILED);
	for (page = 0; page < PAGES; page++)
		memset(own + page * PAGE, 1 + (int)page, PAGE);
	CHECK(umem_write_from(device, 4, own + 4 * PAGE, 2) == 0 && umem_write_from(device, 0, own, 0) == -EINVAL);
	CHECK(umem_write_from(device, PAGES - 1, own, 2) == -EINVAL);
	CHECK(umem_donate(device, 0, own, PAGES) == 0);
	CHECK(umem_donate(device, 1, own, PAGES) == -EINVAL && umem_donate(device, 0, own + 1, 1) == -EINVAL);
	page = PAGES;
	CHECK(umem_write(device, &page, 1) == -EINVAL);
	struct pollfd poller = { .fd = umem_fd(device), .events = POLLIN };
	CHECK(poll(&poller, 1, 0) == 0);
	look(memory);
	umem_close(device);
	umem_close(NULL);
}

int main(void)
{
	alarm(100);
	in_one_process(0);
	in_one_process(UMEM_IN_PLACE);
	by_socket();
	by_hand();
	by_fork();
}
