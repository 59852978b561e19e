/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Every function of libummunotify: api WATCHER. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <ummunotify.h>

#define CHECK(condition)                                                                     \
	do {                                                                                 \
		if (!(condition)) {                                                          \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
			exit(1);                                                             \
		}                                                                            \
	} while (0)

enum { PAGE = 4096 };

int main(int argc, char **argv)
{
	CHECK(argc == 2);
	struct ummunotify *notifier = NULL;
	CHECK(ummunotify_open("telepathy", &notifier) == -EINVAL && notifier == NULL);
	CHECK(strstr(ummunotify_last_error(), "telepathy") != NULL);
	CHECK(ummunotify_open(argv[1], &notifier) == 0);
	CHECK(strcmp(ummunotify_watcher(notifier), argv[1]) == 0);

	__u32 features = 7;
	CHECK(ummunotify_exchange_features(notifier, &features) == 0 && features == 0);
	CHECK(ummunotify_exchange_features(notifier, &features) == -EINVAL);

	/* With one watcher there is no page, and who would map it is told so. */
	const volatile __u64 *counter = ummunotify_counter(notifier), *again = NULL;
	if (strcmp(argv[1], "perf") == 0) {
		CHECK(counter == NULL && ummunotify_counter_fd(notifier) == -ENODEV);
	} else {
		again = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, ummunotify_counter_fd(notifier), 0);
		CHECK(again != MAP_FAILED && *counter == 0 && *again == 0);
	}
	CHECK(ummunotify_count(notifier) == 0);

	char *start = mmap(NULL, 3 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	CHECK(start != MAP_FAILED);
	struct ummunotify_register_ioctl range = {
		.start = (uintptr_t)start,
		.end = (uintptr_t)start + 3 * PAGE,
		.user_cookie = 5,
	};
	CHECK(ummunotify_register(notifier, &range) == 0);
	CHECK(ummunotify_register(notifier, &range) == -EINVAL);
	struct ummunotify_event events[4];
	CHECK(ummunotify_read(notifier, events, 4, 0) == -EAGAIN);

	CHECK(munmap(start + PAGE, PAGE) == 0);
	CHECK(ummunotify_count(notifier) == 1);
	CHECK(counter == NULL || (*counter == 1 && *again == 1));
	struct pollfd descriptor = { .fd = ummunotify_fd(notifier), .events = POLLIN };
	CHECK(poll(&descriptor, 1, 0) == 1);
	CHECK(ummunotify_read(notifier, events, 1, 1) == 1);
	CHECK(events[0].type == UMMUNOTIFY_EVENT_TYPE_INVAL && events[0].flags == UMMUNOTIFY_EVENT_FLAG_HINT);
	CHECK(events[0].user_cookie_counter == 5 && events[0].hint_start == (uintptr_t)start + PAGE);
	CHECK(ummunotify_read(notifier, events, 4, 1) == 1);
	CHECK(events[0].type == UMMUNOTIFY_EVENT_TYPE_LAST && events[0].user_cookie_counter == 1);
	CHECK(ummunotify_unregister(notifier, 5) == 0);
	CHECK(ummunotify_unregister(notifier, 5) == -EINVAL);
	ummunotify_close(notifier);
	CHECK(ummunotify_open(NULL, &notifier) == 0);
	ummunotify_close(notifier);
	return 0;
}
