/*-------------------------------------------------------------------------
 *
 * http.c
 *	  HTTP requests: many at a time, none of them waited for.
 *
 * The sockets of libcurl live in an epoll descriptor of ours, which the caller
 * waits for together with its latch.  What a single request needs is in
 * http_transfer.c.  Everything that callbacks touch is malloc'd and nothing in
 * them ereports: a jump out of libcurl would leave it locked.
 *
 * Signals are blocked while libcurl works, because it looks names up in threads
 * that inherit the mask: our signal handlers must not run in those.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <curl/curl.h>
#include <errno.h>
#include <signal.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "storage/fd.h"

#include "base/http.h"
#include "base/http_transfer.h"

#define EVENTS_AT_ONCE 128

struct RedriveHttp
{
	CURLM	   *multi;
	int			epoll_fd;
	int			n_transfers;
	int			in_flight;
	int64		timer_ms;		/* when libcurl wants to be called, -1 = never */
	Transfer  **transfers;		/* transfers that were ever needed */
	int			n_made;
	Transfer   *unused;			/* those that are free */
	Transfer   *done;			/* those whose result can be fetched, in order */
	Transfer  **last_done;
};

static int64
now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64) ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* libcurl: watch this socket, or do not any more. */
static int
watch_socket(CURL *easy, curl_socket_t fd, int what, void *arg, void *watched)
{
	RedriveHttp *http = arg;
	struct epoll_event event = {0};

	if (what == CURL_POLL_REMOVE)
	{
		(void) epoll_ctl(http->epoll_fd, EPOLL_CTL_DEL, fd, &event);
		return 0;
	}
	event.data.fd = fd;
	event.events = ((what & CURL_POLL_IN) ? EPOLLIN : 0) | ((what & CURL_POLL_OUT) ? EPOLLOUT : 0);
	if (epoll_ctl(http->epoll_fd, watched != NULL ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) != 0)
	{
		/*
		 * a socket number that was closed and is used again, or is still
		 * known
		 */
		if (epoll_ctl(http->epoll_fd, errno == ENOENT ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &event) != 0)
			return -1;
	}
	(void) curl_multi_assign(http->multi, fd, http);
	return 0;
}

/* libcurl: call me in so many milliseconds. */
static int
set_timer(CURLM *multi, long timeout_ms, void *arg)
{
	RedriveHttp *http = arg;

	http->timer_ms = timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
	return 0;
}

/* Make room for requests; NULL when something cannot be had. */
static RedriveHttp *
make_http(int max_transfers)
{
	RedriveHttp *http = calloc(1, sizeof(RedriveHttp));

	if (http == NULL)
		return NULL;
	http->timer_ms = -1;
	http->last_done = &http->done;
	http->n_transfers = max_transfers;
	http->transfers = calloc(max_transfers, sizeof(Transfer *));
	http->multi = curl_multi_init();
	http->epoll_fd = -1;
	if (AcquireExternalFD())
	{
		http->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
		if (http->epoll_fd < 0)
			ReleaseExternalFD();
	}
	if (http->transfers == NULL || http->multi == NULL || http->epoll_fd < 0)
	{
		redrive_http_destroy(http);
		return NULL;
	}
	curl_multi_setopt(http->multi, CURLMOPT_SOCKETFUNCTION, watch_socket);
	curl_multi_setopt(http->multi, CURLMOPT_SOCKETDATA, http);
	curl_multi_setopt(http->multi, CURLMOPT_TIMERFUNCTION, set_timer);
	curl_multi_setopt(http->multi, CURLMOPT_TIMERDATA, http);
	curl_multi_setopt(http->multi, CURLMOPT_PIPELINING, (long) CURLPIPE_NOTHING);

	/*
	 * it counts connections in use too: with less, slow ones push all others
	 * out
	 */
	curl_multi_setopt(http->multi, CURLMOPT_MAXCONNECTS, (long) max_transfers * 2);
	return http;
}

/*
 * Make room for so many requests at a time.
 *
 * What it returns is malloc'd and owns descriptors: the caller has to see to it
 * that redrive_http_destroy() is called, in an error too.  Errors: 53000 when
 * libcurl is too old or something cannot be had.
 */
RedriveHttp *
redrive_http_create(int max_transfers)
{
	static bool initialized = false;
	RedriveHttp *http;

	if (!initialized)
	{
		if (curl_global_init(CURL_GLOBAL_DEFAULT) != 0 || curl_version_info(CURLVERSION_NOW)->version_num < 0x075500)
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
					 errmsg("could not initialize libcurl"),
					 errdetail("It is version %s.", curl_version_info(CURLVERSION_NOW)->version),
					 errhint("Version 7.85 or later is needed.")));
		initialized = true;
	}
	http = make_http(max_transfers);
	if (http == NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("could not prepare for HTTP requests"),
				 errhint("There is no memory, or no file descriptor: see max_files_per_process and the limits of the operating system.")));
	return http;
}

/* The descriptor to wait for: when it is readable, call redrive_http_drive(). */
int
redrive_http_fd(RedriveHttp *http)
{
	return http->epoll_fd;
}

/* In how many milliseconds redrive_http_drive() has to be called; -1 = not. */
long
redrive_http_timeout_ms(RedriveHttp *http)
{
	return http->timer_ms < 0 ? -1 : (long) Max(http->timer_ms - now_ms(), 0);
}

int
redrive_http_in_flight(RedriveHttp *http)
{
	return http->in_flight;
}

/* Find a transfer that is free, or make one; NULL when there is no room. */
static Transfer *
free_transfer(RedriveHttp *http)
{
	Transfer   *transfer = http->unused;

	if (transfer != NULL)
		http->unused = transfer->next;
	else if (http->n_made < http->n_transfers)
	{
		transfer = redrive_make_transfer(http);
		if (transfer != NULL)
			http->transfers[http->n_made++] = transfer;
	}
	return transfer;
}

/* Forget a transfer's request and let another use it. */
static void
release_transfer(RedriveHttp *http, Transfer *transfer)
{
	redrive_clear_transfer(transfer);
	transfer->next = http->unused;
	http->unused = transfer;
}


/*
 * Begin a request; redrive_http_drive() carries it on.
 *
 * Everything of the request is copied.  Returns false when there is no room or
 * no memory; then nothing has begun.
 */
bool
redrive_http_start(RedriveHttp *http, const RedriveHttpRequest *request)
{
	Transfer   *transfer = free_transfer(http);

	if (transfer == NULL)
		return false;
	if (!redrive_prepare_transfer(transfer, request) || curl_multi_add_handle(http->multi, transfer->easy) != CURLM_OK)
	{
		release_transfer(http, transfer);
		return false;
	}
	transfer->running = true;
	http->in_flight++;
	return true;
}

/* Let libcurl do what can be done now; never blocks, never ereports. */
void
redrive_http_drive(RedriveHttp *http)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	sigset_t	all;
	sigset_t	before;
	CURLMsg    *msg;
	int			n;
	int			running;

	sigfillset(&all);
	(void) sigprocmask(SIG_BLOCK, &all, &before);
	n = epoll_wait(http->epoll_fd, events, EVENTS_AT_ONCE, 0);
	for (int i = 0; i < n; i++)
		(void) curl_multi_socket_action(http->multi, events[i].data.fd,
										((events[i].events & EPOLLIN) ? CURL_CSELECT_IN : 0) |
										((events[i].events & EPOLLOUT) ? CURL_CSELECT_OUT : 0) |
										((events[i].events & (EPOLLERR | EPOLLHUP)) ? CURL_CSELECT_ERR : 0), &running);
	if (http->timer_ms >= 0 && now_ms() >= http->timer_ms)
	{
		http->timer_ms = -1;
		(void) curl_multi_socket_action(http->multi, CURL_SOCKET_TIMEOUT, 0, &running);
	}
	while ((msg = curl_multi_info_read(http->multi, &n)) != NULL)
	{
		Transfer   *transfer;

		if (msg->msg != CURLMSG_DONE || curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, (char **) &transfer) != CURLE_OK)
			continue;
		transfer->code = msg->data.result;
		transfer->running = false;
		(void) curl_multi_remove_handle(http->multi, transfer->easy);
		http->in_flight--;
		*http->last_done = transfer;
		http->last_done = &transfer->next;
		transfer->next = NULL;
	}
	(void) sigprocmask(SIG_SETMASK, &before, NULL);
}

/*
 * Get the next request that has ended; false when there is none.
 *
 * What the result points to is valid until redrive_http_free_result().
 */
bool
redrive_http_next_result(RedriveHttp *http, RedriveHttpResult *result)
{
	Transfer   *transfer = http->done;

	if (transfer == NULL)
		return false;
	http->done = transfer->next;
	if (http->done == NULL)
		http->last_done = &http->done;
	redrive_fill_result(transfer, result);
	return true;
}

void
redrive_http_free_result(RedriveHttpResult *result)
{
	Transfer   *transfer = result->transfer;

	release_transfer(transfer->http, transfer);
}

/* Give up the requests of which nothing was sent, and say which. */
void
redrive_http_cancel_unsent(RedriveHttp *http, void (*cancelled) (void *arg))
{
	for (int i = 0; i < http->n_made; i++)
	{
		Transfer   *transfer = http->transfers[i];
		curl_off_t	pretransfer = 0;

		if (!transfer->running ||
			curl_easy_getinfo(transfer->easy, CURLINFO_PRETRANSFER_TIME_T, &pretransfer) != CURLE_OK || pretransfer > 0)
			continue;
		cancelled(transfer->arg);
		(void) curl_multi_remove_handle(http->multi, transfer->easy);
		release_transfer(http, transfer);
		http->in_flight--;
	}
}

/* Give up what is under way and free everything. */
void
redrive_http_destroy(RedriveHttp *http)
{
	for (int i = 0; i < http->n_made; i++)
	{
		Transfer   *transfer = http->transfers[i];

		if (transfer->running)
			(void) curl_multi_remove_handle(http->multi, transfer->easy);
		redrive_free_transfer(transfer);
	}
	(void) curl_multi_cleanup(http->multi);
	if (http->epoll_fd >= 0)
	{
		close(http->epoll_fd);
		ReleaseExternalFD();
	}
	free(http->transfers);
	free(http);
}
