/*-------------------------------------------------------------------------
 *
 * pusher.c
 *	  The process that pushes the states of tasks to platforms.
 *
 * One per database that has platforms.  It claims in a short transaction, sends
 * in none, and records what came of many requests in one, with the next claim:
 * so no lock and no snapshot is held while somebody else is waited for.  It
 * runs no code of users; it has the secrets of all.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "commands/extension.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/procsignal.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/http.h"
#include "base/shmem.h"
#include "base/xact.h"
#include "flow/push.h"
#include "proc/pusher.h"

#define TICK_MS 30000
#define FLUSH_RESULTS 256		/* record when there are so many */
#define FLUSH_MS 10				/* or the oldest has waited so long */
#define GRACE_MS 500			/* for what is under way at shutdown */
#define AFTER_ERROR_MS 1000

static MemoryContext pusher_cxt;	/* platforms */
static MemoryContext pushes_cxt;	/* pushes that are under way or to be
									 * recorded */
static MemoryContext results_cxt;	/* texts of results */
static MemoryContext claim_cxt; /* one claim */
static ResourceOwner sending_owner;
static RedriveHttp *http;
static int	http_room;
static WaitEventSet *wait_set;
static List *platforms = NIL;
static int64 platforms_version = -1;
static Push *results = NULL;	/* to be recorded, the oldest first */
static Push **last_result = &results;
static int	n_results = 0;
static TimestampTz first_result_at;
static bool half_ended = false; /* of what a platform had under way */
static bool look_for_locks = false; /* others have locked what we record */

static void
destroy_http(int code, Datum arg)
{
	if (http != NULL)
		redrive_http_destroy(http);
	http = NULL;
}

/*
 * Make what requests need, anew when there shall be room for more or fewer and
 * nothing is under way.
 */
static void
prepare_http(void)
{
	if (http != NULL && (redrive_http_in_flight(http) > 0 || http_room == redrive_push_max_in_flight))
		return;
	if (wait_set != NULL)
		FreeWaitEventSet(wait_set);
	wait_set = NULL;
	destroy_http(0, (Datum) 0);
	http_room = redrive_push_max_in_flight;
	http = redrive_http_create(http_room);
	wait_set = redrive_wait_set(3);
	AddWaitEventToSet(wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(wait_set, WL_SOCKET_READABLE, redrive_http_fd(http), NULL, NULL);
}

static void
append_result(Push *push)
{
	if (n_results++ == 0)
		first_result_at = GetCurrentTimestamp();
	push->next = NULL;
	*last_result = push;
	last_result = &push->next;
}

/* Those of each platform are counted: it need not wait for what others have under way. */
static void
add_result(Push *push)
{
	Platform   *p = push->platform;

	append_result(push);
	p->in_flight--;
	p->ended++;
	half_ended |= p->ended >= p->in_flight;
}

/* Try to record again what was locked. */
static void
take_held(void)
{
	Push	   *push;

	while ((push = redrive_take_held()) != NULL)
		append_result(push);
}

/* Nothing was sent: as if it had not been claimed. */
static void
give_back(void *arg)
{
	Push	   *push = arg;

	push->given_back = true;
	push->finished_at = GetCurrentTimestamp();
	add_result(push);
}

/* Let requests go on, and take what has ended. */
static void
drive(void)
{
	RedriveHttpResult result;
	MemoryContext old_cxt = MemoryContextSwitchTo(results_cxt);

	redrive_http_drive(http);
	while (redrive_http_next_result(http, &result))
	{
		Push	   *push = result.arg;

		redrive_judge_push(push, &result);
		redrive_http_free_result(&result);
		add_result(push);
	}
	MemoryContextSwitchTo(old_cxt);
}

/* Send what was claimed; what there is no room for is given back. */
static void
send_push(Claimed *claimed)
{
	Push	   *push = claimed->push;
	Platform   *p = push->platform;
	const char **headers = p->headers;
	int			n = p->n_headers;
	int64		now_s = (int64) (GetCurrentTimestamp() / USECS_PER_SEC) + (POSTGRES_EPOCH_JDATE - UNIX_EPOCH_JDATE) * SECS_PER_DAY;
	size_t		body_len = strlen(claimed->body);
	RedriveHttpRequest request = {0};

	headers[n++] = psprintf("webhook-id: %s", claimed->id);
	headers[n++] = psprintf("webhook-timestamp: %lld", (long long) now_s);
	headers[n++] = psprintf("webhook-sequence: %lld", (long long) push->version);
	if (p->signing[0] != NULL)
	{
		char	   *signature = redrive_sign(p->signing[0], claimed->id, now_s, claimed->body, body_len);

		if (p->signing[1] != NULL)
			signature = psprintf("%s %s", signature, redrive_sign(p->signing[1], claimed->id, now_s, claimed->body, body_len));
		headers[n++] = psprintf("webhook-signature: %s", signature);
	}
	headers[n] = NULL;
	request.method = p->method;
	request.url = p->url;
	request.headers = headers;
	if (strcmp(p->method, "GET") != 0)
	{
		request.body = claimed->body;
		request.body_len = body_len;
	}
	request.timeout_ms = p->timeout_ms;
	request.connect_timeout_ms = p->connect_timeout_ms;
	request.allow_http = p->allow_http;
	request.allow = p->allow;
	request.n_allow = p->n_allow;
	request.arg = push;
	p->in_flight++;
	p->tokens -= 1;
	if (!redrive_http_start(http, &request))
		give_back(push);
	headers[p->n_headers] = NULL;
}

/* Forget the first of n results, which have been recorded, or held if NULL; hold the others. */
static void
forget_results(Push **pushes, int n_recorded, int n)
{
	ListCell   *lc;

	for (int i = n_recorded; i < n; i++)
		redrive_hold_push(pushes[i], pushes_cxt);
	for (int i = 0; i < n_recorded; i++)
	{
		if (pushes[i] == NULL)
			continue;
		if (pushes[i]->texts != NULL)
			MemoryContextDelete(pushes[i]->texts);
		pfree(pushes[i]);
	}
	results = NULL;
	last_result = &results;
	n_results = 0;
	half_ended = false;
	foreach(lc, platforms)
		((Platform *) lfirst(lc))->ended = 0;
	MemoryContextReset(results_cxt);
}

/* What the breakers have learned has been written down. */
static void
platforms_are_written(void)
{
	ListCell   *lc;

	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		if (!p->written)
			continue;
		p->changed = false;
		p->new_attempts = 0;
		p->new_delivered = 0;
	}
}

/*
 * One transaction: record what has ended, and claim what is due.
 *
 * Returns what was claimed, in claim_cxt, and sets when to claim again at the
 * latest.  Of n results those that are locked are put last; n becomes how many
 * are not.  What it throws leaves everything as it was.
 */
static List *
turn(Push **pushes, int *n, int64 pusher, bool may_claim, TimestampTz *next_due)
{
	List	   *claimed = NIL;

	redrive_worker_begin();
	if (!OidIsValid(get_extension_oid("pg_redrive", true)))
		proc_exit(0);
	redrive_limit_lock_wait();
	if (*n > 0 && look_for_locks)
		*n = redrive_put_locked_last(pushes, *n);
	if (*n > 0)
		redrive_record_pushes(pushes, *n, false);
	redrive_write_platforms(platforms);
	if (may_claim)
	{
		int64		version = redrive_platforms_version();
		int			room = http_room - redrive_http_in_flight(http);

		if (version != platforms_version)
		{
			platforms = redrive_load_platforms(platforms, pusher_cxt);
			platforms_version = version;
		}
		MemoryContextSwitchTo(claim_cxt);
		if (room > 0)
			claimed = redrive_claim_pushes(platforms, room, pusher, pushes_cxt);
		/* without room, requests that end will tell */
		*next_due = list_length(claimed) < room ? redrive_next_push(platforms, claimed) : DT_NOEND;
		MemoryContextSwitchTo(TopMemoryContext);
	}
	redrive_worker_end();
	return claimed;
}

/*
 * The same, and what follows an error: data that cannot be stored is recorded
 * by itself; after anything else, a full disk perhaps, everything is kept and
 * tried again.  Returns whether it went well.
 */
static bool
take_turn(int64 pusher, bool may_claim, TimestampTz *next_due)
{
	Push	  **pushes = MemoryContextAlloc(claim_cxt, Max(n_results, 1) * sizeof(Push *));
	int			n = 0;
	int			n_recorded;
	volatile int sqlstate = 0;
	List	   *claimed = NIL;
	ListCell   *lc;

	for (Push *push = results; push != NULL; push = push->next)
		pushes[n++] = push;
	n_recorded = n;
	PG_TRY();
	{
		claimed = turn(pushes, &n_recorded, pusher, may_claim, next_due);
	}
	PG_CATCH();
	{
		/* the process shall end */
		if (ShutdownRequestPending || ProcDiePending)
			PG_RE_THROW();
		sqlstate = geterrcode();
		if (sqlstate == ERRCODE_LOCK_NOT_AVAILABLE && !look_for_locks)
			;					/* below */
		else if (ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_DATA_EXCEPTION || n == 0)
			EmitErrorReport();
		FlushErrorState();
		redrive_worker_abort();
	}
	PG_END_TRY();
	if (sqlstate != 0)
	{
		MemoryContextSwitchTo(claim_cxt);
		*next_due = 0;
		if (sqlstate == ERRCODE_LOCK_NOT_AVAILABLE && !look_for_locks)
			return look_for_locks = true;
		if (ERRCODE_TO_CATEGORY(sqlstate) != ERRCODE_DATA_EXCEPTION || n == 0)
			return false;
		redrive_record_apart(pushes, n, false, pushes_cxt);
		n_recorded = n;
		/* nothing was claimed, and the platforms are still to be written */
	}
	else
	{
		look_for_locks = n_recorded < n;
		platforms_are_written();
	}
	forget_results(pushes, n_recorded, n);
	/* signing wants an owner for what the cryptographic library allocates */
	CurrentResourceOwner = sending_owner;
	foreach(lc, claimed)
		send_push(lfirst(lc));
	CurrentResourceOwner = NULL;
	return true;
}

/* Finish what can be finished soon: the rest is left to its lease. */
static void
shut_down(int64 pusher)
{
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), GRACE_MS);
	TimestampTz ignored;

	redrive_http_cancel_unsent(http, give_back);
	while (redrive_http_in_flight(http) > 0 && GetCurrentTimestamp() < end)
	{
		WaitEvent	event;
		long		ms = redrive_http_timeout_ms(http);

		(void) WaitEventSetWait(wait_set, ms < 0 ? 20 : Min(ms, 20), &event, 1, redrive_wait_event("RedrivePusherShutdown"));
		ResetLatch(MyLatch);
		drive();
	}
	take_held();
	if (n_results > 0)
		(void) take_turn(pusher, false, &ignored);
}

/* Read the settings again. */
static void
reload_settings(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	if (http != NULL)
		redrive_http_reload(http);
}

/* Main function of the pusher; arg is the database. */
void
redrive_pusher_main(Datum arg)
{
	int64		pusher;
	TimestampTz next_due = 0;	/* 0 = at once */
	TimestampTz not_before = 0; /* after an error */
	TimestampTz reaped_at = 0;
	uint32		wait_event;

	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, SignalHandlerForShutdownRequest);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(DatumGetObjectId(arg), InvalidOid, 0);
	if (!redrive_enter_pusher())
		proc_exit(0);
	wait_event = redrive_wait_event("RedrivePusher");
	pusher_cxt = AllocSetContextCreate(TopMemoryContext, "redrive platforms", ALLOCSET_DEFAULT_SIZES);
	pushes_cxt = AllocSetContextCreate(TopMemoryContext, "redrive pushes", ALLOCSET_DEFAULT_SIZES);
	results_cxt = AllocSetContextCreate(TopMemoryContext, "redrive results", ALLOCSET_DEFAULT_SIZES);
	claim_cxt = AllocSetContextCreate(TopMemoryContext, "redrive claim", ALLOCSET_DEFAULT_SIZES);
	sending_owner = ResourceOwnerCreate(NULL, "redrive pusher");
	/* unlike those of all pushers before; leases are held under this number */
	pusher = ((int64) GetCurrentTimestamp() / 1000) * 4194304 % INT64CONST(0x7fffffffffff) + MyProcPid;
	before_shmem_exit(destroy_http, (Datum) 0);

	while (!ShutdownRequestPending)
	{
		TimestampTz now = GetCurrentTimestamp();
		long		sleep_ms;
		bool		flush;
		WaitEvent	events[3];
		int			n;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload_settings();
		prepare_http();

		if (TimestampDifferenceExceeds(reaped_at, now, TICK_MS))
		{
			redrive_worker_begin();
			if (!OidIsValid(get_extension_oid("pg_redrive", true)))
				proc_exit(0);
			(void) redrive_reap_pushes(reaped_at == 0 ? pusher : 0);
			redrive_worker_end();
			reaped_at = now;
		}
		if (now >= redrive_held_until())
			take_held();
		flush = n_results >= FLUSH_RESULTS ||
			(n_results > 0 && (half_ended || TimestampDifferenceExceeds(first_result_at, now, FLUSH_MS)));
		if (now >= not_before && (flush || (redrive_enabled && now >= next_due)))
		{
			MemoryContextReset(claim_cxt);
			MemoryContextSwitchTo(claim_cxt);
			if (!take_turn(pusher, redrive_enabled, &next_due))
			{
				not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), AFTER_ERROR_MS);
				next_due = not_before;
			}
			MemoryContextSwitchTo(TopMemoryContext);
			if (platforms == NIL && n_results == 0 && redrive_held_until() == DT_NOEND && platforms_version >= 0)
				break;			/* there is nothing to push to */
		}

		now = GetCurrentTimestamp();
		sleep_ms = redrive_http_timeout_ms(http);
		if (sleep_ms < 0)
			sleep_ms = TICK_MS;
		if (redrive_enabled && next_due != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, next_due));
		if (redrive_held_until() != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, redrive_held_until()));
		if (n_results > 0)
			sleep_ms = Min(sleep_ms, Max(FLUSH_MS, TimestampDifferenceMilliseconds(now, not_before)));
		n = WaitEventSetWait(wait_set, sleep_ms, events, lengthof(events), wait_event);
		for (int i = 0; i < n; i++)
			if (events[i].events & WL_LATCH_SET)
			{
				ResetLatch(MyLatch);
				redrive_look_at_all(platforms);
				next_due = 0;
			}
		if (n == 0 && now >= next_due)
			redrive_look_at_all(platforms);
		drive();
	}
	if (ShutdownRequestPending)
		shut_down(pusher);
	proc_exit(0);
}
