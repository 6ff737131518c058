/*-------------------------------------------------------------------------
 *
 * segment.c
 *	  Run items in a subtransaction.
 *
 * The only place that calls handlers.  A segment is good as a whole or rolled
 * back as a whole; the caller (execute.c) decides how long it is and what
 * follows.  Whatever a handler did to settings or the current role is undone
 * after each item; deferred constraints are fired before the segment ends, so
 * that their errors are caught here and not at commit.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/htup_details.h"
#include "access/xact.h"
#include "catalog/pg_type.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/latch.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/syscache.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "utils/typcache.h"

#include "base/compat.h"
#include "base/crumbs.h"
#include "flow/build.h"
#include "flow/deferred.h"
#include "flow/segment.h"
#include "flow/set.h"

/* A callback of a handler without item_timeout has so long. */
#define CALLBACK_TIMEOUT_US INT64CONST(60000000)

static TimeoutId item_timeout;
static TimeoutId stop_tick;
static bool in_worker = false;
static volatile sig_atomic_t item_timed_out = false;
static volatile sig_atomic_t stop_requested = false;

/* Timeout: the running item has had its time. */
static void
cancel_item(void)
{
	item_timed_out = true;
	InterruptPending = true;
	QueryCancelPending = true;
	SetLatch(MyLatch);
}

/* Timeout, each second: a stop was requested and the item does not end. */
static void
enforce_stop(void)
{
	if (stop_requested)
	{
		InterruptPending = true;
		ProcDiePending = true;
		SetLatch(MyLatch);
	}
}

/*
 * SIGTERM in an executor: end the interval at the next item and give the rest
 * back; an item that takes longer than a second or two is cut off.
 */
void
redrive_request_stop(SIGNAL_ARGS)
{
	int			save_errno = errno;

	stop_requested = true;
	SetLatch(MyLatch);
	errno = save_errno;
}

/* Has this process been asked to end? */
bool
redrive_stop_requested(void)
{
	return stop_requested;
}

/* Register the timeouts, once per process. */
void
redrive_init_timeouts(bool worker)
{
	static bool done = false;

	if (!done)
	{
		item_timeout = RegisterTimeout(USER_TIMEOUT, cancel_item);
		stop_tick = RegisterTimeout(USER_TIMEOUT, enforce_stop);
		done = true;
	}
	in_worker = worker;
}

/* Watch, once a second, for a stop that the running item does not follow. */
void
redrive_arm_stop(void)
{
	if (in_worker)
		enable_timeout_every(stop_tick, GetCurrentTimestamp() + INT64CONST(1000000), 1000);
}

/* Stop watching: an idle worker shall not be woken by it. */
void
redrive_disarm_stop(void)
{
	if (in_worker)
		disable_timeout(stop_tick, false);
}

/*
 * Count the subtransactions of this transaction that have an id and are not
 * rolled back, those within handlers included.
 */
int
redrive_live_subxacts(void)
{
	return MyProc->subxidStatus.overflowed ? PGPROC_MAX_CACHED_SUBXIDS : MyProc->subxidStatus.count;
}

/* Enter code of users: as the session's own role, which it cannot change. */
void
redrive_enter_user_code(UserCode *save)
{
	GetUserIdAndSecContext(&save->user, &save->context);
	SetUserIdAndSecContext(save->user, save->context | SECURITY_LOCAL_USERID_CHANGE | USER_CODE_CONTEXT);
	save->nestlevel = NewGUCNestLevel();
}

/* Leave code of users: whatever it set is as before. */
void
redrive_leave_user_code(UserCode *save)
{
	AtEOXact_GUC(false, save->nestlevel);
	SetUserIdAndSecContext(save->user, save->context);
}

/* Is the session's role still there?  The session would go on without it. */
static bool
role_exists(void)
{
	AcceptInvalidationMessages();
	return SearchSysCacheExists1(AUTHOID, ObjectIdGetDatum(GetUserId()));
}

/* Throw 42704 when the session's role was dropped. */
static void
require_role(void)
{
	if (!role_exists())
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("its owner, the role with OID %u, was dropped", GetUserId())));
}

/*
 * Look the handler's function up and prepare to call it.
 *
 * Throws what the look-up throws: 42883 when it is gone, 42501 when the
 * session's role may not execute it, 42704 when there is no such role any more.
 * The result lives as long as the chunk.
 */
RedriveCall *
redrive_prepare_call(RedriveChunk *chunk, RedriveSlot *slot)
{
	MemoryContext old_cxt = MemoryContextSwitchTo(chunk->cxt);
	RedriveCall *call = palloc0(sizeof(RedriveCall));
	HandlerSignature signature = chunk->handler.signature;
	Oid			function = redrive_find_function(chunk->handler.function, signature, false);
	const int	nargs = signature == SIGNATURE_KEY_PAYLOAD ? 2 : 1;

	require_role();
	if (!redrive_may_execute(function, GetUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for function %s", chunk->handler.function),
				 errhint("Grant EXECUTE on it to role \"%s\".", GetUserNameFromId(GetUserId(), false))));
	call->chunk = chunk;
	call->slot = slot;
	call->item_cxt = AllocSetContextCreate(chunk->cxt, "redrive item", ALLOCSET_DEFAULT_SIZES);
	fmgr_info_cxt(function, &call->flinfo, chunk->cxt);
	call->fcinfo = palloc0(SizeForFunctionCallInfo(nargs));
	InitFunctionCallInfoData(*call->fcinfo, &call->flinfo, nargs, InvalidOid, NULL, NULL);
	if (signature == SIGNATURE_ITEM || signature == SIGNATURE_ITEMS)
		call->item_desc = BlessTupleDesc(lookup_rowtype_tupdesc_copy(redrive_type("item"), -1));
	if (signature == SIGNATURE_ITEMS && redrive_check_set_result(function))
		call->outcome_desc = BlessTupleDesc(lookup_rowtype_tupdesc_copy(redrive_type("outcome"), -1));
	MemoryContextSwitchTo(old_cxt);
	return call;
}

/* Make the redrive.item of an item, in CurrentMemoryContext. */
Datum
redrive_item_datum(RedriveCall *call, RedriveItem *item)
{
	Datum		values[5];
	bool		nulls[5] = {false};

	values[0] = Int64GetDatum(call->chunk->batch_id);
	values[1] = Int64GetDatum(item->item_no);
	values[2] = PointerGetDatum(item->key);
	nulls[2] = item->key == NULL;
	values[3] = item->payload;
	values[4] = Int32GetDatum(item->attempts + 1);
	return HeapTupleGetDatum(heap_form_tuple(call->item_desc, values, nulls));
}

/* Put the items from page index "from" up to "to" into the arguments of the call. */
static void
fill_arguments(RedriveCall *call, int from, int to)
{
	NullableDatum *args = call->fcinfo->args;
	RedriveItem *item = &call->chunk->page[from];

	args[0].isnull = false;
	switch (call->chunk->handler.signature)
	{
		case SIGNATURE_PAYLOAD:
			args[0].value = item->payload;
			break;
		case SIGNATURE_KEY_PAYLOAD:
			args[0].value = PointerGetDatum(item->key);
			args[0].isnull = item->key == NULL;
			args[1].value = item->payload;
			args[1].isnull = false;
			break;
		case SIGNATURE_ITEM:
			args[0].value = redrive_item_datum(call, item);
			break;
		case SIGNATURE_ITEMS:
			args[0].value = redrive_set_argument(call, from, to);
			break;
	}
	if (call->flinfo.fn_strict && args[0].isnull)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("the item has no key, and the function is strict"),
				 errhint("Submit the item with a key, or declare the function CALLED ON NULL INPUT.")));
}

/*
 * Call the function for the items from page index "from" up to "to", which is one
 * unless it is a set handler, in the open subtransaction.
 */
static void
run_call(RedriveCall *call, int from, int to)
{
	RedriveItem *page = call->chunk->page;
	const int64 timeout_us = call->chunk->handler.item_timeout;
	Tuplestorestate *outcomes = NULL;
	UserCode	save;
	PgStat_FunctionCallUsage usage;

	MemoryContextReset(call->item_cxt);
	MemoryContextSwitchTo(call->item_cxt);
	call->slot->item_started_at = GetCurrentTimestamp();
	call->slot->item_no = page[from].item_no;
	redrive_crumb->id = page[to - 1].item_no;
	fill_arguments(call, from, to);
	item_timed_out = false;
	if (timeout_us > 0)
		enable_timeout_after(item_timeout, (int) Max(timeout_us / 1000, 1));

	PushActiveSnapshot(GetTransactionSnapshot());
	redrive_enter_user_code(&save);
	call->fcinfo->isnull = false;
	pgstat_init_function_usage(call->fcinfo, &usage);
	if (call->outcome_desc != NULL)
		outcomes = redrive_call_for_outcomes(call);
	else
		(void) FunctionCallInvoke(call->fcinfo);
	pgstat_end_function_usage(&usage, true);
	redrive_leave_user_code(&save);
	PopActiveSnapshot();

	if (timeout_us > 0)
	{
		disable_timeout(item_timeout, false);
		/* it may have fired after the last check */
		CHECK_FOR_INTERRUPTS();
	}
	if (outcomes != NULL)
		redrive_take_outcomes(call, outcomes, from, to);
	CommandCounterIncrement();
}

/* Is this error about the process or the caller rather than the item? */
static bool
is_ours(ErrorData *error)
{
	if (error->sqlerrcode == ERRCODE_QUERY_CANCELED && !item_timed_out && !in_worker)
		return true;			/* Ctrl-C in CALL redrive.work() */
	return false;
}

/*
 * Run the items of the page from index "from" up to "to" in one subtransaction: a
 * set handler in one call, others item by item.
 *
 * Items that have a failure already are left out.  May end early, at an item
 * boundary, when the interval's time is up or a stop was requested; reached
 * tells.  After an error the subtransaction is rolled back, and the error is
 * in the interval's context.
 */
void
redrive_run_segment(RedriveCall *call, RedriveInterval *interval,
					int from, int to, SegmentResult *result)
{
	MemoryContext old_cxt = CurrentMemoryContext;
	ResourceOwner old_owner = CurrentResourceOwner;
	RedriveItem *page = call->chunk->page;
	const int64 interval_us = call->chunk->handler.commit_interval;
	const bool	set = call->chunk->handler.signature == SIGNATURE_ITEMS;
	volatile int current = from;
	volatile int good = 0;

	result->error = NULL;
	result->failed = -1;
	redrive_crumb->id = 0;
	redrive_crumb->kind = set && to - from > 1 ? CRUMB_SEGMENT : CRUMB_ITEM;
	result->handler_gone = result->bad_outcome = false;
	call->judging = false;
	call->n_outcomes = 0;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		if (set)
		{
			run_call(call, from, to);
			current = to;
			good = to - from;
			call->slot->open_succeeded += good;
		}
		for (; current < to; current++)
		{
			if (page[current].failure != NULL)
				continue;
			run_call(call, current, current + 1);
			good = good + 1;
			call->slot->open_succeeded++;
			if (stop_requested || redrive_live_subxacts() >= MAX_LIVE_SUBXACTS ||
				(!interval->replay && call->slot->item_started_at - interval->started_at >= interval_us))
			{
				current++;
				break;
			}
			CHECK_FOR_INTERRUPTS();
		}
		result->reached = current;
		MemoryContextSwitchTo(call->item_cxt);
		current = to;			/* an error from here on is nobody's in
								 * particular */
		if (good > 1)
			redrive_crumb->kind = CRUMB_SEGMENT;
		redrive_fire_deferred();
		/* rights and policies were not those of anybody */
		require_role();
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old_cxt);
		CurrentResourceOwner = old_owner;
	}
	PG_CATCH();
	{
		redrive_crumb->kind = CRUMB_NONE;
		disable_timeout(item_timeout, false);
		MemoryContextSwitchTo(interval->cxt);
		result->error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old_cxt);
		CurrentResourceOwner = old_owner;
		call->slot->open_succeeded -= good;
		if (is_ours(result->error))
			ReThrowError(result->error);
		if (item_timed_out)
			QueryCancelPending = false;
		if (item_timed_out && result->error->sqlerrcode == ERRCODE_QUERY_CANCELED)
		{
			result->error->message = MemoryContextStrdup(interval->cxt, "item timeout");
			result->error->detail = MemoryContextStrdup(interval->cxt,
														psprintf("The item ran longer than %lld ms.",
																 (long long) (call->chunk->handler.item_timeout / 1000)));
		}
		if (current < to && !(set && to - from > 1))
			result->failed = current;
		result->bad_outcome = call->judging;
		/* else it would go on with the rows of this call */
		if (call->outcome_desc != NULL)
			call->flinfo.fn_extra = NULL;
		result->handler_gone = !role_exists() || !SearchSysCacheExists1(PROCOID, ObjectIdGetDatum(call->flinfo.fn_oid));
	}
	PG_END_TRY();
	redrive_crumb->kind = CRUMB_NONE;
	call->slot->item_no = 0;
}

/*
 * Call a callback n times, args by args, in one subtransaction, as the session's
 * role.
 *
 * crumb and ids are what the crumb shall say.  body gets what a build function
 * returned.  Returns false, with everything rolled back and the error in
 * CurrentMemoryContext, when any call fails.
 */
bool
redrive_run_callbacks(const char *function, CallbackKind kind, int64 timeout_us, int n, Datum *args,
					  CrumbKind crumb, int64 *ids, char **body, ErrorData **error)
{
	MemoryContext old_cxt = CurrentMemoryContext;
	ResourceOwner old_owner = CurrentResourceOwner;
	volatile bool ok = true;

	BeginInternalSubTransaction(NULL);
	PG_TRY();
	{
		const int	nargs = kind == CALLBACK_ON_FINISH ? 2 : 1;
		FmgrInfo	flinfo;
		UserCode	save;
		Datum		result;
		MemoryContext call_cxt = AllocSetContextCreate(CurrentMemoryContext, "redrive callback",
													   ALLOCSET_DEFAULT_SIZES);
		Oid			funcid = redrive_find_callback(function, kind, false);

		LOCAL_FCINFO(fcinfo, 2);

		if (!redrive_may_execute(funcid, GetUserId()))
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("permission denied for function %s", function),
					 errhint("Grant EXECUTE on it to role \"%s\".", GetUserNameFromId(GetUserId(), false))));
		fmgr_info(funcid, &flinfo);
		for (int i = 0; i < n; i++)
		{
			MemoryContextReset(call_cxt);
			MemoryContextSwitchTo(call_cxt);
			InitFunctionCallInfoData(*fcinfo, &flinfo, nargs, InvalidOid, NULL, NULL);
			for (int a = 0; a < nargs; a++)
			{
				fcinfo->args[a].value = args[nargs * i + a];
				fcinfo->args[a].isnull = false;
			}
			redrive_crumb->id = ids[i];
			redrive_crumb->kind = crumb;
			item_timed_out = false;
			enable_timeout_after(item_timeout, (int) ((timeout_us > 0 ? timeout_us : CALLBACK_TIMEOUT_US) / 1000));
			PushActiveSnapshot(GetTransactionSnapshot());
			redrive_enter_user_code(&save);
			result = FunctionCallInvoke(fcinfo);
			redrive_leave_user_code(&save);
			PopActiveSnapshot();
			disable_timeout(item_timeout, false);
			CHECK_FOR_INTERRUPTS();
			CommandCounterIncrement();
			if (kind == CALLBACK_BUILD)
				*body = redrive_built_body(result, fcinfo->isnull, old_cxt);
		}
		if (n > 1)
			redrive_crumb->kind = CRUMB_SEGMENT;
		redrive_fire_deferred();
		ReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old_cxt);
		CurrentResourceOwner = old_owner;
	}
	PG_CATCH();
	{
		redrive_crumb->kind = CRUMB_NONE;
		disable_timeout(item_timeout, false);
		if (item_timed_out)
			QueryCancelPending = false;
		MemoryContextSwitchTo(old_cxt);
		*error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
		MemoryContextSwitchTo(old_cxt);
		CurrentResourceOwner = old_owner;
		if (is_ours(*error))
			ReThrowError(*error);
		ok = false;
	}
	PG_END_TRY();
	redrive_crumb->kind = CRUMB_NONE;
	return ok;
}
