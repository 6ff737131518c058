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
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/push.h"
#include "proc/pusher.h"

#define TICK_MS 30000
#define LOCKED_MS 200			/* to the next try, when others have locked
								 * what is to be reaped */
#define GRACE_MS 500			/* for what is under way at shutdown */

static MemoryContext pusher_cxt;	/* platforms */
static MemoryContext pushes_cxt;	/* pushes that are under way or to be
									 * recorded */
static MemoryContext results_cxt;	/* texts of results */
static MemoryContext claim_cxt; /* one claim */
static ResourceOwner sending_owner;
static RedriveHttp *http;
static WaitEventSet *wait_set;
static List *platforms = NIL;
static int64 platforms_version = -1;
static bool look_for_locks = false; /* others have locked what we record */
static TimestampTz prefetched_until = DT_NOEND; /* then it is looked at again */
static TimestampTz reaped_at = 0;	/* also of the last look at everything */
static int	reap_ms = TICK_MS;	/* from then to the next time */
static enum
{
	RECORDING, CLAIMING, ANOTHER
}			step;				/* of a turn */

static void
destroy_http(int code, Datum arg)
{
	if (http != NULL)
		redrive_http_destroy(http);
	http = NULL;
}

/* Make what requests need. */
static void
prepare_http(void)
{
	http = redrive_http_create(redrive_push_max_in_flight);
	wait_set = redrive_wait_set(3);
	AddWaitEventToSet(wait_set, WL_LATCH_SET, PGINVALID_SOCKET, MyLatch, NULL);
	AddWaitEventToSet(wait_set, WL_EXIT_ON_PM_DEATH, PGINVALID_SOCKET, NULL, NULL);
	AddWaitEventToSet(wait_set, WL_SOCKET_READABLE, redrive_http_fd(http), NULL, NULL);
}

/* Let requests go on, take what has ended, and send what there is room for now. */
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
		redrive_add_result(push);
	}
	MemoryContextSwitchTo(claim_cxt);
	/* signing wants an owner for what the cryptographic library allocates */
	CurrentResourceOwner = sending_owner;
	prefetched_until = redrive_send_prefetched(http, platforms);
	CurrentResourceOwner = NULL;
	MemoryContextSwitchTo(old_cxt);
}

/* The platform for which one push is claimed, and for no other; NULL = all are claimed for. */
static Platform *
platform_alone(void)
{
	ListCell   *lc;

	foreach(lc, platforms)
		if (((Platform *) lfirst(lc))->alone)
		return lfirst(lc);
	return NULL;
}

/* Begin a transaction. */
static void
begin(void)
{
	step = ANOTHER;
	redrive_worker_begin();
	pgstat_report_activity(STATE_RUNNING, "redrive: push");
	if (!redrive_version_fits(DEBUG1))
		proc_exit(0);
	redrive_limit_lock_wait();
}

/* One transaction: end what others have left, if it is time to. */
static void
reap(int64 pusher)
{
	if (!TimestampDifferenceExceeds(reaped_at, GetCurrentTimestamp(), reap_ms))
		return;
	begin();
	reap_ms = redrive_reap_pushes(pusher) ? LOCKED_MS : TICK_MS;
	redrive_worker_end();
	reaped_at = GetCurrentTimestamp();
}

/*
 * One transaction: record what has ended, and claim what is due.
 *
 * Returns what was claimed, in claim_cxt, and sets when to claim again at the
 * latest.  Of n results those that are locked are put last; n becomes how many
 * are not.  What it throws leaves everything as it was; step says where it was.
 */
static List *
turn(Push **pushes, int *n, int64 pusher, bool may_claim, TimestampTz *next_due)
{
	List	   *claimed = NIL;

	begin();
	step = RECORDING;
	if (*n > 0 && look_for_locks)
		*n = redrive_put_locked_last(pushes, *n);
	if (*n > 0)
		redrive_record_pushes(pushes, *n, false);
	for (int i = 0; i < *n; i++)
		pushes[i]->recorded = true;
	step = ANOTHER;
	if (may_claim)
	{
		int64		version = redrive_platforms_version();
		int			room = redrive_push_max_in_flight - redrive_http_in_flight(http);
		Platform   *alone = platform_alone();
		bool		outdated = false;

		if (version != platforms_version)
		{
			platforms = redrive_load_platforms(platforms, pusher_cxt);
			platforms_version = version;
		}
		MemoryContextSwitchTo(claim_cxt);
		step = CLAIMING;
		if (room > 0)
			claimed = redrive_claim_pushes(platforms, alone, alone != NULL ? 1 : room, pusher, &outdated);
		step = ANOTHER;
		if (outdated)
			platforms = redrive_load_platforms(platforms, pusher_cxt);
		*next_due = alone != NULL ? 0 : redrive_next_push(platforms, claimed);
		MemoryContextSwitchTo(TopMemoryContext);
	}
	redrive_write_platforms(platforms);
	if (claimed != NIL)
		redrive_worker_end_durably();
	else
		redrive_worker_end();
	return claimed;
}

/* Block the push that cannot be claimed, in a transaction of its own; false = there is none. */
static bool
block_alone(Platform *platform, const char *message)
{
	bool		blocked;

	redrive_worker_begin();
	redrive_limit_lock_wait();
	blocked = redrive_block_next_push(platform, message);
	redrive_worker_end();
	MemoryContextSwitchTo(claim_cxt);
	return blocked;
}

/*
 * The same, and what follows an error: what cannot be recorded is found and recorded
 * by itself, what cannot be claimed is found and blocked; after anything else, a full disk
 * perhaps, everything is kept and tried again.  Returns whether it went well.
 */
static bool
take_turn(int64 pusher, bool may_claim, TimestampTz *next_due)
{
	int			n;
	Push	  **pushes = redrive_results(&n);
	int			n_recorded = n;
	Platform   *alone = platform_alone();
	ErrorData  *volatile error = NULL;
	List	   *claimed = NIL;
	ListCell   *lc;

	/* a platform at a time: requests go on meanwhile */
	while (redrive_judge_answers(pushes, n))
		redrive_http_drive(http);
	PG_TRY();
	{
		if (may_claim)
			reap(pusher);
		claimed = turn(pushes, &n_recorded, pusher, may_claim, next_due);
	}
	PG_CATCH();
	{
		/* the process shall end */
		if (ProcDiePending)
			PG_RE_THROW();
		MemoryContextSwitchTo(claim_cxt);
		error = CopyErrorData();
		for (int i = 0; i < n; i++)
			pushes[i]->recorded = false;
		if (step != RECORDING || redrive_is_outage(error->sqlerrcode))
			EmitErrorReport();
		FlushErrorState();
		redrive_worker_abort();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(claim_cxt);
	if (error != NULL)
	{
		const int	sqlstate = error->sqlerrcode;

		*next_due = 0;
		if (redrive_is_outage(sqlstate) || step == ANOTHER)
			return false;
		if (step == CLAIMING)
		{
			const int	category = ERRCODE_TO_CATEGORY(sqlstate);

			/*
			 * somebody has cancelled it, or it was not the first time, or has
			 * locked a table; or it is the statement that is wrong, and no
			 * push
			 */
			if (category == ERRCODE_OPERATOR_INTERVENTION || sqlstate == ERRCODE_LOCK_NOT_AVAILABLE || category == ERRCODE_SYNTAX_ERROR_OR_ACCESS_RULE_VIOLATION || sqlstate == ERRCODE_INTERNAL_ERROR)
				return false;
			foreach(lc, platforms)
				((Platform *) lfirst(lc))->alone = alone == NULL && ((Platform *) lfirst(lc))->more_due;
			return alone == NULL || block_alone(alone, error->message);
		}
		if (sqlstate == ERRCODE_LOCK_NOT_AVAILABLE)
		{
			const bool	again = !look_for_locks;

			look_for_locks = true;
			return again;
		}
		if (n == 0)
			return false;
		redrive_record_apart(pushes, n, false, pushes_cxt);
		/* nothing was claimed, and the platforms are still to be written */
	}
	else
	{
		look_for_locks = n_recorded < n;
		redrive_platforms_are_written(platforms);
		redrive_forget_pushes(pushes, n_recorded);
		for (int i = n_recorded; i < n; i++)
			redrive_hold_push(pushes[i], pushes_cxt);
		if (alone != NULL)
			alone->alone = false;
	}
	redrive_clear_results(platforms);
	MemoryContextReset(results_cxt);
	redrive_keep_claimed(claimed, pushes_cxt);
	CurrentResourceOwner = sending_owner;
	prefetched_until = redrive_send_pushes(http, platforms, claimed, pushes_cxt);
	CurrentResourceOwner = NULL;
	return true;
}

/* Finish what can be finished soon: the rest is left to its lease. */
static void
shut_down(int64 pusher)
{
	TimestampTz end = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), GRACE_MS);
	TimestampTz ignored;

	redrive_give_back_prefetched(platforms);
	redrive_http_cancel_unsent(http, redrive_give_back_push);
	while (redrive_http_in_flight(http) > 0 && GetCurrentTimestamp() < end)
	{
		WaitEvent	event;
		long		ms = redrive_http_timeout_ms(http);

		(void) WaitEventSetWait(wait_set, ms < 0 ? 20 : Min(ms, 20), &event, 1, redrive_wait_event("RedrivePusherShutdown"));
		ResetLatch(MyLatch);
		drive();
	}

	/*
	 * the first time it may find that some are locked, and holds them the
	 * second time
	 */
	redrive_take_held();
	for (int i = 0; redrive_results_due(0) != DT_NOEND && i < 3; i++)
		(void) take_turn(pusher, false, &ignored);
}

/* Read the settings again. */
static void
reload_settings(void)
{
	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	redrive_http_reload(http, redrive_push_max_in_flight);
}

/* Main function of the pusher; arg is the database. */
void
redrive_pusher_main(Datum arg)
{
	int64		pusher;
	TimestampTz next_due = 0;	/* 0 = at once */
	TimestampTz not_before = 0; /* after an error */
	uint32		wait_event;

	redrive_take_signals(SignalHandlerForShutdownRequest);
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
	prepare_http();

	while (!ShutdownRequestPending)
	{
		TimestampTz now = GetCurrentTimestamp();
		long		sleep_ms;
		WaitEvent	events[3];
		int			n;

		/* a cancel is for a statement, and there is none now */
		QueryCancelPending = false;
		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload_settings();

		/* what nobody has told us of is found now and then */
		if (TimestampDifferenceExceeds(reaped_at, now, reap_ms))
			next_due = 0;
		if (now >= redrive_held_until())
			redrive_take_held();
		if (now >= not_before && (now >= redrive_results_due(now) || (redrive_enabled && now >= next_due)))
		{
			MemoryContextReset(claim_cxt);
			MemoryContextSwitchTo(claim_cxt);
			if (now >= next_due)
				redrive_look_at_all(platforms);
			if (!take_turn(pusher, redrive_enabled, &next_due))
			{
				not_before = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), REDRIVE_AFTER_ERROR_MS);
				next_due = not_before;
			}
			MemoryContextSwitchTo(TopMemoryContext);
			if (platforms == NIL && redrive_results_due(now) == DT_NOEND && redrive_held_until() == DT_NOEND && platforms_version >= 0)
				break;			/* there is nothing to push to */
		}

		now = GetCurrentTimestamp();
		sleep_ms = redrive_http_timeout_ms(http);
		if (sleep_ms < 0 || sleep_ms > reap_ms)
			sleep_ms = reap_ms;
		if (redrive_enabled && next_due != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, next_due));
		if (redrive_held_until() != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, redrive_held_until()));
		if (prefetched_until != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, prefetched_until));
		if (redrive_results_due(now) != DT_NOEND)
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(now, Max(redrive_results_due(now), not_before)));
		n = WaitEventSetWait(wait_set, sleep_ms, events, lengthof(events), wait_event);
		for (int i = 0; i < n; i++)
			if (events[i].events & WL_LATCH_SET)
			{
				ResetLatch(MyLatch);
				next_due = 0;
			}
		drive();
	}
	if (ShutdownRequestPending)
		shut_down(pusher);
	proc_exit(0);
}
