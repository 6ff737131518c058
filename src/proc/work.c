/*-------------------------------------------------------------------------
 *
 * work.c
 *	  Procedures: run work in the foreground, wait for a batch.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "storage/latch.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/claim.h"
#include "flow/execute.h"
#include "flow/segment.h"

/* How often wait() looks when nobody could tell it. */
#define WAIT_MS 1000
#define WORK_NAP_MS 200

PG_FUNCTION_INFO_V1(redrive_work);
PG_FUNCTION_INFO_V1(redrive_wait);

static RedriveSql batch_state = {
	"SELECT b.state, b.state::text AS name, h.owner::oid AS owner, h.kind = 'external' AS external"
	" FROM redrive.batches AS b JOIN redrive.handlers AS h ON h.handler_id = b.handler_id WHERE b.batch_id = $1",
	1, {INT8OID}
};

/* Return the time an interval after now, 0 for no interval. */
static TimestampTz
deadline_after(FunctionCallInfo fcinfo, int arg)
{
	if (PG_ARGISNULL(arg))
		return 0;
	return DatumGetTimestampTz(DirectFunctionCall2(timestamptz_pl_interval,
												   TimestampTzGetDatum(GetCurrentTimestamp()),
												   PG_GETARG_DATUM(arg)));
}

/* Work for handlers of others is not done: say so to those who have none. */
static void
notice_no_handler(void)
{
	static RedriveSql any_handler = {
		"SELECT EXISTS (SELECT FROM redrive.handlers AS h WHERE h.owner::oid = $1) AS found",
		1, {OIDOID}
	};
	Datum		owner = ObjectIdGetDatum(GetUserId());

	if (redrive_sql(&any_handler, &owner, NULL) == 1 && !redrive_bool(0, "found"))
		ereport(NOTICE,
				(errmsg("role \"%s\" owns no handler", GetUserNameFromId(GetUserId(), false)),
				 errhint("redrive.work() runs the batches of handlers that the caller owns: call it as their owner.")));
}

/*
 * SQL: CALL work(max_time, until_idle)
 *
 * The same engine as an executor's, for handlers of the current role.
 */
Datum
redrive_work(PG_FUNCTION_ARGS)
{
	TimestampTz deadline = deadline_after(fcinfo, 0);
	bool		until_idle = PG_ARGISNULL(1) ? true : PG_GETARG_BOOL(1);
	RedriveSlot own_slot = {0};
	RedriveSlot *slot = NULL;
	MemoryContext cxt;
	uint32		wait_event = redrive_wait_event("RedriveWork");
	int			save_isolation = DefaultXactIsoLevel;
	bool		save_read_only = DefaultXactReadOnly;

	redrive_require_nonatomic(fcinfo, "redrive.work()");
	if (RecoveryInProgress())
		redrive_require_writable(fcinfo);
	(void) redrive_version_fits(ERROR);
	if (redrive_shared != NULL)
		slot = redrive_slot_take(MyDatabaseId, GetUserId(), true);
	if (slot == NULL)
		slot = &own_slot;		/* not preloaded: nobody can look at it */
	slot->foreground = true;
	redrive_init_timeouts(false);
	cxt = AllocSetContextCreate(TopMemoryContext, "redrive work", ALLOCSET_DEFAULT_SIZES);

	PG_TRY();
	{
		redrive_connect_nonatomic();
		notice_no_handler();
		/* as in an executor, whatever the session has by default */
		DefaultXactIsoLevel = XACT_READ_COMMITTED;
		DefaultXactReadOnly = false;
		redrive_commit();
		if (redrive_shared == NULL)
		{
			/* there is no supervisor to do it */
			redrive_rescue();
		}
		for (;;)
		{
			RedriveTurn turn = TURN_IDLE;

			CHECK_FOR_INTERRUPTS();
			if (deadline != 0 && GetCurrentTimestamp() >= deadline)
				break;
			if (redrive_enabled)
				turn = redrive_execute_next(slot, GetUserId(), cxt, deadline);
			if (turn == TURN_WORKED)
				continue;
			if (until_idle && turn == TURN_IDLE)
				break;
			slot->state = SLOT_IDLE;
			(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 turn == TURN_LOCKED ? LOCKED_NAP_MS : WORK_NAP_MS, wait_event);
			ResetLatch(MyLatch);
			slot->state = SLOT_CLAIMING;
		}
		redrive_disconnect();
	}
	PG_FINALLY();
	{
		DefaultXactIsoLevel = save_isolation;
		DefaultXactReadOnly = save_read_only;
		if (slot != &own_slot)
			redrive_slot_free(slot);
		MemoryContextDelete(cxt);
	}
	PG_END_TRY();
	PG_RETURN_VOID();
}

/*
 * SQL: CALL wait(batch_id, timeout, state)
 *
 * Looks in short transactions of its own; between them no snapshot is held.
 */
Datum
redrive_wait(PG_FUNCTION_ARGS)
{
	TimestampTz deadline = deadline_after(fcinfo, 1);
	int64		batch_id;
	Datum		state = (Datum) 0;
	TupleDesc	tupdesc;
	Datum		result[1];
	bool		nulls[1] = {false};
	uint32		wait_event = redrive_wait_event("RedriveWait");

	redrive_require_nonatomic(fcinfo, "redrive.wait()");
	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("batch_id must not be null"),
				 errhint("Give the number that redrive.submit() returned.")));
	batch_id = PG_GETARG_INT64(0);
	(void) get_call_result_type(fcinfo, NULL, &tupdesc);
	tupdesc = BlessTupleDesc(tupdesc);

	redrive_connect_nonatomic();
	if (redrive_shared != NULL)
		ConditionVariablePrepareToSleep(&redrive_shared->batch_ended);
	for (;;)
	{
		Datum		values[1] = {Int64GetDatum(batch_id)};
		bool		isnull;
		char	   *name;
		long		sleep_ms = WAIT_MS;

		CHECK_FOR_INTERRUPTS();
		if (redrive_sql(&batch_state, values, NULL) == 0)
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_OBJECT),
					 errmsg("batch %lld does not exist", (long long) batch_id),
					 errhint("See redrive.batch_progress for the batches there are.")));
		if (!has_privs_of_role(GetUserId(), DatumGetObjectId(redrive_column(0, "owner", &isnull))))
			ereport(ERROR,
					(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
					 errmsg("permission denied for batch %lld", (long long) batch_id),
					 errdetail("It belongs to another role."),
					 errhint("Ask a member of the owning role, or a superuser.")));
		state = redrive_column(0, "state", &isnull);
		name = redrive_text(0, "name", CurrentMemoryContext);
		if (strcmp(name, "finished") == 0 || strcmp(name, "cancelled") == 0 || strcmp(name, "paused") == 0)
			break;
		if (deadline != 0)
		{
			sleep_ms = Min(sleep_ms, TimestampDifferenceMilliseconds(GetCurrentTimestamp(), deadline));
			if (sleep_ms <= 0)
				break;
		}
		if (!redrive_bool(0, "external") && (redrive_shared == NULL || redrive_max_workers == 0))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("no workers can run batch %lld", (long long) batch_id),
					 redrive_shared == NULL ?
					 errdetail("pg_redrive is not in shared_preload_libraries.") :
					 errdetail("redrive.max_workers is 0."),
					 errhint("Change that, or run the work with CALL redrive.work().")));
		redrive_commit();
		if (redrive_shared != NULL)
			(void) ConditionVariableTimedSleep(&redrive_shared->batch_ended, sleep_ms, wait_event);
		else
		{
			(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, Min(sleep_ms, WORK_NAP_MS), wait_event);
			ResetLatch(MyLatch);
		}
	}
	ConditionVariableCancelSleep();
	redrive_disconnect();

	result[0] = state;
	return HeapTupleGetDatum(heap_form_tuple(tupdesc, result, nulls));
}
