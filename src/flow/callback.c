/*-------------------------------------------------------------------------
 *
 * callback.c
 *	  Callbacks that could not run where they arose: on_finish, and on_unlock
 *	  of an item that a pass, a cancel or a failed call made final.
 *
 * A callback's row goes away in the transaction of its effects, so each is
 * done once.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "utils/builtins.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/callback.h"
#include "flow/segment.h"

#define CALLBACK_DELAY_US 1000000
#define CALLBACK_DELAY_MAX_US INT64CONST(3600000000)
#define CALLBACKS_AT_ONCE 50

/*
 * The handler whose callback has been due longest comes first.  Per handler, as
 * only then what is due longest is found by the index, however many there are.
 */
static RedriveSql due_callbacks = {
	"SELECT k.callback_id, k.kind = 'on_finish' AS on_finish, k.key, k.batch_id, k.run_no, k.failures,"
	" (extract(epoch FROM h.item_timeout) * 1000000)::bigint AS item_timeout,"
	" CASE k.kind WHEN 'on_finish' THEN h.on_finish ELSE h.on_unlock END AS function"
	" FROM (SELECT x.*, f.next_attempt_at FROM redrive.handlers AS x CROSS JOIN LATERAL ("
	"   SELECT y.next_attempt_at FROM redrive.callbacks AS y"
	"   WHERE y.handler_id = x.handler_id AND y.next_attempt_at <= $3 ORDER BY y.next_attempt_at LIMIT 1) AS f"
	"  WHERE x.owner = $1 AND NOT x.paused ORDER BY f.next_attempt_at) AS h"
	" CROSS JOIN LATERAL ("
	"  SELECT y.* FROM redrive.callbacks AS y WHERE y.handler_id = h.handler_id AND y.next_attempt_at <= $3"
	"  ORDER BY y.next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED) AS k"
	" LIMIT $2",
	3, {OIDOID, INT4OID, TIMESTAMPTZOID}
};

static RedriveSql delete_callback = {
	"DELETE FROM redrive.callbacks WHERE callback_id = $1",
	1, {INT8OID}
};

static RedriveSql delay_callback = {
	"UPDATE redrive.callbacks SET failures = failures + 1, next_attempt_at = $2, message = $3 WHERE callback_id = $1",
	3, {INT8OID, TIMESTAMPTZOID, TEXTOID}
};

/* One row of due_callbacks. */
typedef struct Callback
{
	int64		callback_id;
	bool		on_finish;
	Datum		args[2];
	int32		failures;
	int64		timeout_us;		/* 0 = the default */
	char	   *function;		/* NULL = the handler has none any more */
} Callback;

/* Run one callback and delete its row, or put it off. */
static void
run_callback(Callback *callback)
{
	ErrorData  *error = NULL;
	Datum		values[3];

	values[0] = Int64GetDatum(callback->callback_id);
	if (callback->function == NULL ||
		redrive_run_callbacks(callback->function, callback->on_finish ? CALLBACK_ON_FINISH : CALLBACK_ON_UNLOCK, callback->timeout_us,
							  1, callback->args, CRUMB_CALLBACK, &callback->callback_id, NULL, &error))
	{
		(void) redrive_sql(&delete_callback, values, NULL);
		return;
	}
	values[1] = TimestampTzGetDatum(GetCurrentTimestamp() +
									redrive_backoff(CALLBACK_DELAY_US, 2, CALLBACK_DELAY_MAX_US,
													callback->failures, callback->callback_id));
	values[2] = CStringGetTextDatum(error->message ? error->message : "");
	(void) redrive_sql(&delay_callback, values, NULL);
	redrive_wake_supervisor_at_commit();
}

/*
 * Run due callbacks of a role's handlers and commit.
 *
 * Returns whether there were any.  Needs a non-atomic connection.
 */
bool
redrive_run_due_callbacks(RedriveSlot *slot, Oid owner)
{
	Datum		values[3];
	uint64		rows;
	Callback   *callbacks;

	values[0] = ObjectIdGetDatum(owner);
	values[1] = Int32GetDatum(CALLBACKS_AT_ONCE);
	values[2] = TimestampTzGetDatum(GetCurrentTimestamp());
	rows = redrive_sql(&due_callbacks, values, NULL);
	if (rows == 0)
		return false;
	slot->state = SLOT_CALLBACKS;
	callbacks = palloc0(rows * sizeof(Callback));
	for (uint64 row = 0; row < rows; row++)
	{
		Callback   *callback = &callbacks[row];
		bool		isnull;
		Datum		key;

		callback->callback_id = redrive_int64(row, "callback_id");
		callback->on_finish = redrive_bool(row, "on_finish");
		callback->failures = DatumGetInt32(redrive_column(row, "failures", &isnull));
		callback->timeout_us = redrive_int64(row, "item_timeout");
		callback->function = redrive_text(row, "function", CurrentMemoryContext);
		if (callback->on_finish)
		{
			callback->args[0] = redrive_column(row, "batch_id", &isnull);
			callback->args[1] = redrive_column(row, "run_no", &isnull);
		}
		else
		{
			key = redrive_column(row, "key", &isnull);
			callback->args[0] = PointerGetDatum(DatumGetTextPCopy(key));
		}
	}

	/*
	 * If one crashes the server its row must be there to say so, and a fold
	 * is lazy.  We have locked the rows since, which writes WAL.
	 */
	redrive_make_durable();
	for (uint64 row = 0; row < rows; row++)
		run_callback(&callbacks[row]);
	redrive_commit();
	slot->state = SLOT_CLAIMING;
	return true;
}
