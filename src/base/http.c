/*-------------------------------------------------------------------------
 *
 * http.c
 *	  HTTP requests: many at a time, none of them waited for.
 *
 * The sockets of libcurl live in an epoll descriptor of ours, see
 * http_sockets.c, which the caller waits for together with its latch.  What a
 * single request needs is in http_transfer.c.  Everything that callbacks touch
 * is malloc'd and nothing in them ereports: a jump out of libcurl would leave it
 * locked.
 *
 * Signals are blocked while libcurl works, because it looks names up in threads
 * that inherit the mask: our signal handlers must not run in those.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <curl/curl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <time.h>

#include "storage/fd.h"

#include "base/http.h"
#include "base/http_sockets.h"
#include "base/http_transfer.h"

#define EVENTS_AT_ONCE 128

/* Connections made with the settings and certificates of one time. */
struct Pool
{
	CURLM	   *multi;
	int			in_flight;
	int64		timer_ms;		/* when libcurl wants to be called, -1 = never */
	Pool	   *next;			/* an older one, which ends what it began */
};

struct RedriveHttp
{
	Pool	   *pool;			/* for new requests */
	int			generation;		/* how many there have been */
	RedriveSockets sockets;
	int			n_transfers;
	int			in_flight;
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

/* libcurl: call me in so many milliseconds. */
static int
set_timer(CURLM *multi, long timeout_ms, void *arg)
{
	Pool	   *pool = arg;

	pool->timer_ms = timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
	return 0;
}

/* Begin with new connections; false when there is no memory. */
static bool
add_pool(RedriveHttp *http)
{
	const int	n = http->n_transfers;
	Pool	   *pool = calloc(1, sizeof(Pool));

	if (pool == NULL)
		return false;
	pool->multi = curl_multi_init();
	if (pool->multi == NULL)
	{
		free(pool);
		return false;
	}
	pool->timer_ms = -1;
	curl_multi_setopt(pool->multi, CURLMOPT_SOCKETFUNCTION, redrive_socket_watch);
	curl_multi_setopt(pool->multi, CURLMOPT_SOCKETDATA, &http->sockets);
	curl_multi_setopt(pool->multi, CURLMOPT_TIMERFUNCTION, set_timer);
	curl_multi_setopt(pool->multi, CURLMOPT_TIMERDATA, pool);
	curl_multi_setopt(pool->multi, CURLMOPT_PIPELINING, (long) CURLPIPE_NOTHING);

	/*
	 * Both count connections in use too: with fewer, slow ones push all
	 * others out.  But those that are kept must leave descriptors for new
	 * ones; when there are so many, the oldest is closed.  A third of all
	 * descriptors is for us and others that PostgreSQL does not know.
	 */
	curl_multi_setopt(pool->multi, CURLMOPT_MAXCONNECTS, (long) n * 2);
	curl_multi_setopt(pool->multi, CURLMOPT_MAX_TOTAL_CONNECTIONS, (long) Max(n, Min(n * 2, max_safe_fds / 4)));
#if LIBCURL_VERSION_NUM >= 0x081400

	/*
	 * 8.20, where lookups share threads: none that hangs, perhaps longer than
	 * its request, holds up others, nor the end of the pool.
	 */
	(void) curl_multi_setopt(pool->multi, CURLMOPT_RESOLVE_THREADS_MAX, (long) n * 4);
	(void) curl_multi_setopt(pool->multi, CURLMOPT_QUICK_EXIT, 1L);
#endif
	pool->next = http->pool;
	http->pool = pool;
	http->generation++;
	return true;
}

/* Close the connections of a pool whose requests have all ended. */
static void
free_pool(Pool *pool)
{
	(void) curl_multi_cleanup(pool->multi);
	free(pool);
}

/* Do so with those that take no new requests. */
static void
free_old_pools(RedriveHttp *http)
{
	for (Pool **pool = &http->pool->next; *pool != NULL;)
	{
		Pool	   *old = *pool;

		if (old->in_flight > 0)
			pool = &old->next;
		else
		{
			*pool = old->next;
			free_pool(old);
		}
	}
}

/* Make room for requests; NULL when something cannot be had. */
static RedriveHttp *
make_http(int max_transfers)
{
	RedriveHttp *http = calloc(1, sizeof(RedriveHttp));

	if (http == NULL)
		return NULL;
	http->last_done = &http->done;
	http->n_transfers = max_transfers;
	http->transfers = calloc(max_transfers, sizeof(Transfer *));
	if (!redrive_sockets_init(&http->sockets) || http->transfers == NULL || !add_pool(http))
	{
		redrive_http_destroy(http);
		return NULL;
	}
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

/*
 * The settings may have changed, or the file with certificates: what begins
 * from now on uses them and none of the connections that there are, and so many
 * requests may be under way.
 *
 * Errors: 53200 without memory.
 */
void
redrive_http_reload(RedriveHttp *http, int max_transfers)
{
	Transfer  **transfers = realloc(http->transfers, Max(max_transfers, http->n_made) * sizeof(Transfer *));

	if (transfers != NULL)
	{
		http->transfers = transfers;
		http->n_transfers = max_transfers;
	}
	if (transfers == NULL || !add_pool(http))
		ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
	free_old_pools(http);
}

/* The descriptor to wait for: when it is readable, call redrive_http_drive(). */
int
redrive_http_fd(RedriveHttp *http)
{
	return http->sockets.epoll_fd;
}

/* In how many milliseconds there is a result, or redrive_http_drive() has to be called; -1 = not. */
long
redrive_http_timeout_ms(RedriveHttp *http)
{
	int64		timer_ms = -1;

	if (http->done != NULL)
		return 0;
	for (Pool *pool = http->pool; pool != NULL; pool = pool->next)
		if (pool->timer_ms >= 0 && (timer_ms < 0 || pool->timer_ms < timer_ms))
			timer_ms = pool->timer_ms;
	return timer_ms < 0 ? -1 : (long) Max(timer_ms - now_ms(), 0);
}

/* How many requests are under way, or have a result that nobody has freed. */
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
		transfer = redrive_make_transfer(http, &http->sockets);
		if (transfer != NULL)
			http->transfers[http->n_made++] = transfer;
	}
	if (transfer != NULL)
		http->in_flight++;
	return transfer;
}

/* A transfer is not under way any more. */
static void
take_out(RedriveHttp *http, Transfer *transfer)
{
	(void) curl_multi_remove_handle(transfer->pool->multi, transfer->easy);
	transfer->pool->in_flight--;
	transfer->pool = NULL;
}

/* Forget a transfer's request and let another use it. */
static void
release_transfer(RedriveHttp *http, Transfer *transfer)
{
	redrive_clear_transfer(transfer);
	transfer->next = http->unused;
	http->unused = transfer;
	http->in_flight--;
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
	if (!redrive_prepare_transfer(transfer, request, http->generation) ||
		curl_multi_add_handle(http->pool->multi, transfer->easy) != CURLM_OK)
	{
		release_transfer(http, transfer);
		return false;
	}
	transfer->pool = http->pool;
	transfer->pool->in_flight++;
	return true;
}

/* Let libcurl do what can be done now; never blocks, never ereports. */
void
redrive_http_drive(RedriveHttp *http)
{
	struct epoll_event events[EVENTS_AT_ONCE];
	sigset_t	all;
	sigset_t	before;
	int			n;

	sigfillset(&all);
	(void) sigprocmask(SIG_BLOCK, &all, &before);
	n = epoll_wait(http->sockets.epoll_fd, events, EVENTS_AT_ONCE, 0);
	for (Pool *pool = http->pool; pool != NULL; pool = pool->next)
	{
		CURLMsg    *msg;
		int			ignored;

		/* libcurl passes over sockets of another pool */
		for (int i = 0; i < n; i++)
			if (!redrive_socket_unwanted(&http->sockets, events[i].data.fd))
				(void) curl_multi_socket_action(pool->multi, events[i].data.fd,
												((events[i].events & EPOLLIN) ? CURL_CSELECT_IN : 0) |
												((events[i].events & EPOLLOUT) ? CURL_CSELECT_OUT : 0) |
												((events[i].events & (EPOLLERR | EPOLLHUP)) ? CURL_CSELECT_ERR : 0), &ignored);
		if (pool->timer_ms >= 0 && now_ms() >= pool->timer_ms)
		{
			pool->timer_ms = -1;
			(void) curl_multi_socket_action(pool->multi, CURL_SOCKET_TIMEOUT, 0, &ignored);
		}
		while ((msg = curl_multi_info_read(pool->multi, &ignored)) != NULL)
		{
			Transfer   *transfer;

			if (msg->msg != CURLMSG_DONE || curl_easy_getinfo(msg->easy_handle, CURLINFO_PRIVATE, (char **) &transfer) != CURLE_OK)
				continue;
			transfer->code = msg->data.result;
			take_out(http, transfer);
			*http->last_done = transfer;
			http->last_done = &transfer->next;
			transfer->next = NULL;
		}
	}
	free_old_pools(http);
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

		if (transfer->pool == NULL ||
			curl_easy_getinfo(transfer->easy, CURLINFO_PRETRANSFER_TIME_T, &pretransfer) != CURLE_OK || pretransfer > 0)
			continue;
		cancelled(transfer->arg);
		take_out(http, transfer);
		release_transfer(http, transfer);
	}
}

/* Give up what is under way and free everything. */
void
redrive_http_destroy(RedriveHttp *http)
{
	for (int i = 0; i < http->n_made; i++)
	{
		Transfer   *transfer = http->transfers[i];

		if (transfer->pool != NULL)
			take_out(http, transfer);
		redrive_free_transfer(transfer);
	}
	while (http->pool != NULL)
	{
		Pool	   *pool = http->pool;

		http->pool = pool->next;
		free_pool(pool);
	}
	redrive_sockets_free(&http->sockets);
	free(http->transfers);
	free(http);
}
