/*-------------------------------------------------------------------------
 *
 * push_send.c
 *	  Send what was claimed, at once or when there is room.
 *
 * A platform that answers quickly has more claimed than may be sent to it at a time:
 * what is prefetched is sent as soon as something else has ended, and not only after
 * the next record and claim, and the disk is waited for less often.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/guc.h"
#include "flow/push.h"

#define PREFETCHED_US INT64CONST(200000)	/* then it is given back */

static int	n_prefetched = 0;	/* of all platforms */

/* Nothing was sent: as if it had not been claimed.  It counts as under way. */
void
redrive_give_back_push(void *arg)
{
	Push	   *push = arg;

	push->given_back = true;
	push->taught = true;		/* there is nothing to learn from it */
	push->finished_at = GetCurrentTimestamp();
	redrive_add_result(push);
}

/* A body that is too long is not sent before the task has another. */
static void
refuse_body(Push *push)
{
	push->error_class = "body";
	push->message = "The body is longer than 1 MiB.";
	push->blocked = true;
	push->taught = true;
	push->finished_at = GetCurrentTimestamp();
	redrive_add_result(push);
}

/* Begin the request of a push; what cannot begin is given back. */
static void
send_push(RedriveHttp *http, Push *push)
{
	Platform   *p = push->platform;
	const char **headers = p->headers;
	int			n = p->n_headers;
	int64		now_s;
	const char *body = strcmp(p->method, "GET") != 0 ? push->body : NULL;
	size_t		body_len = body != NULL ? strlen(body) : 0;
	RedriveHttpRequest request = {0};

	p->in_flight++;
	push->started_at = GetCurrentTimestamp();
	if (push->body == NULL || body_len > REDRIVE_HTTP_MAX_BODY)
	{
		refuse_body(push);
		return;
	}
	now_s = (int64) (push->started_at / USECS_PER_SEC) + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;
	headers[n++] = psprintf("webhook-id: %s", push->id);
	headers[n++] = psprintf("webhook-timestamp: %lld", (long long) now_s);
	headers[n++] = psprintf("webhook-sequence: %lld", (long long) push->version);
	if (p->signing[0] != NULL)
	{
		char	   *signature = redrive_sign(p->signing[0], push->id, now_s, body != NULL ? body : "", body_len);

		if (p->signing[1] != NULL)
			signature = psprintf("%s %s", signature, redrive_sign(p->signing[1], push->id, now_s, body != NULL ? body : "", body_len));
		headers[n++] = psprintf("webhook-signature: %s", signature);
	}
	headers[n] = NULL;
	request.method = p->method;
	request.url = p->url;
	request.headers = headers;
	request.body = body;
	request.body_len = body_len;
	request.timeout_ms = p->timeout_ms;
	request.connect_timeout_ms = p->connect_timeout_ms;
	request.allow_http = p->allow_http;
	request.allow = p->allow;
	request.n_allow = p->n_allow;
	request.arg = push;
	if (p->rate_limit > 0)
		p->tokens -= 1;
	if (!redrive_http_start(http, &request))
	{
		push->wait_ms = REDRIVE_AFTER_ERROR_MS;
		redrive_give_back_push(push);
	}
	headers[p->n_headers] = NULL;
}

/* May this push be sent as it was claimed, now or later? */
static bool
is_sendable(Push *push)
{
	Platform   *p = push->platform;

	return redrive_enabled && !p->paused && !p->gone && p->trouble == NULL && p->breaker != BREAKER_OPEN && push->config_version == p->config_version;
}

/* May one more request to this platform begin, since what may be under way was shared out? */
static bool
has_room(RedriveHttp *http, Platform *p)
{
	return p->owner->room > 0 && p->in_flight < redrive_most_at_once(p) && redrive_http_in_flight(http) < redrive_push_max_in_flight;
}

/* Take the first push that a platform has prefetched. */
static Push *
take_prefetched(Platform *p)
{
	Push	   *push = p->prefetched;

	p->prefetched = push->next;
	p->n_prefetched--;
	n_prefetched--;
	return push;
}

/* Add a push to what its platform has prefetched. */
static void
add_prefetched(Push *push)
{
	Platform   *p = push->platform;

	push->next = NULL;
	if (p->prefetched == NULL)
		p->prefetched = push;
	else
		p->last_prefetched->next = push;
	p->last_prefetched = push;
	p->n_prefetched++;
	n_prefetched++;
}

static void
forget_texts(Push *push)
{
	pfree(push->id);
	if (push->body != NULL)
		pfree(push->body);
	push->id = NULL;
	push->body = NULL;
}

/* Give back what a platform has prefetched. */
static void
give_back_prefetched(Platform *p)
{
	while (p->prefetched != NULL)
	{
		Push	   *push = take_prefetched(p);

		forget_texts(push);
		p->in_flight++;
		redrive_give_back_push(push);
	}
}

/* Do so with that of all platforms. */
void
redrive_give_back_prefetched(List *platforms)
{
	ListCell   *lc;

	foreach(lc, platforms)
		give_back_prefetched(lfirst(lc));
}

/* Send what there is room for: of each owner one, then of each a second one, and so on. */
static void
send_in_turn(RedriveHttp *http, List *platforms)
{
	List	   *waiting = NIL;
	bool		sent;
	ListCell   *lc;

	redrive_share_out(platforms);
	foreach(lc, platforms)
		if (((Platform *) lfirst(lc))->prefetched != NULL)
		waiting = lappend(waiting, lfirst(lc));
	do
	{
		sent = false;
		foreach(lc, waiting)
			((Platform *) lfirst(lc))->owner->had_turn = false;
		foreach(lc, waiting)
		{
			Platform   *p = lfirst(lc);
			Push	   *push;

			if (p->prefetched == NULL || p->owner->had_turn || !is_sendable(p->prefetched) || !has_room(http, p))
				continue;
			push = take_prefetched(p);
			send_push(http, push);
			forget_texts(push);
			p->owner->had_turn = true;
			p->owner->room--;
			sent = true;
		}
	} while (sent);
	list_free(waiting);
}

/*
 * Send what was prefetched and has room now; give back what cannot be sent, or has waited
 * for too long: its lease goes on.  Returns when to do so again at the latest, DT_NOEND if
 * nothing is left.
 *
 * Allocates in the current context what is not needed any more afterwards.
 */
TimestampTz
redrive_send_prefetched(RedriveHttp *http, List *platforms)
{
	TimestampTz now;
	TimestampTz until = DT_NOEND;
	ListCell   *lc;

	if (n_prefetched == 0)
		return DT_NOEND;
	now = GetCurrentTimestamp();
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		if (p->prefetched != NULL && now >= p->prefetched->started_at + PREFETCHED_US)
			give_back_prefetched(p);
	}
	send_in_turn(http, platforms);
	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		if (p->prefetched != NULL && !is_sendable(p->prefetched))
			give_back_prefetched(p);
		if (p->prefetched != NULL)
			until = Min(until, p->prefetched->started_at + PREFETCHED_US);
	}
	return until;
}

/*
 * Send what was claimed and committed: what there is no room for is kept in cxt.  Returns
 * what redrive_send_prefetched() does.
 */
TimestampTz
redrive_send_pushes(RedriveHttp *http, List *platforms, List *claimed, MemoryContext cxt)
{
	const TimestampTz now = GetCurrentTimestamp();
	TimestampTz until;
	ListCell   *lc;

	foreach(lc, claimed)
	{
		Push	   *push = lfirst(lc);

		push->started_at = now;
		if (is_sendable(push))
		{
			add_prefetched(push);
			continue;
		}
		forget_texts(push);
		push->platform->in_flight++;
		redrive_give_back_push(push);
	}
	until = redrive_send_prefetched(http, platforms);
	foreach(lc, claimed)
	{
		Push	   *push = lfirst(lc);

		/* that of the others is forgotten */
		if (push->id == NULL)
			continue;
		push->id = MemoryContextStrdup(cxt, push->id);
		if (push->body != NULL)
			push->body = MemoryContextStrdup(cxt, push->body);
	}
	return until;
}
