/*-------------------------------------------------------------------------
 *
 * report.c
 *	  What the views show of shared memory.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "fmgr.h"
#include "funcapi.h"
#include "miscadmin.h"
#include "utils/acl.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/timestamp.h"

#include "base/shmem.h"

#define SLOT_COLUMNS 14

PG_FUNCTION_INFO_V1(redrive__slots);

static const char *
state_name(SlotState state)
{
	switch (state)
	{
		case SLOT_FREE:
			return "free";
		case SLOT_STARTING:
			return "starting";
		case SLOT_CLAIMING:
			return "claiming";
		case SLOT_RUNNING:
			return "running";
		case SLOT_CALLBACKS:
			return "callbacks";
		case SLOT_IDLE:
			return "idle";
	}
	return "unknown";
}

/*
 * SQL: _slots(), the live workers of this database that the caller may see:
 * those of its own roles, all of them for a monitor.
 *
 * The values of a slot are read without a lock against its process: a row may
 * mix two moments, which a view can bear.
 */
Datum
redrive__slots(PG_FUNCTION_ARGS)
{
	ReturnSetInfo *rsinfo = (ReturnSetInfo *) fcinfo->resultinfo;

	bool		monitor;

	InitMaterializedSRF(fcinfo, 0);
	if (redrive_shared == NULL)
		return (Datum) 0;
	monitor = DatumGetBool(DirectFunctionCall3(has_column_privilege_name_name,
											   CStringGetTextDatum("redrive.batches"),
											   CStringGetTextDatum("batch_id"),
											   CStringGetTextDatum("SELECT")));

	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveSlot slot = redrive_shared->slots[i];
		bool		running = slot.state == SLOT_RUNNING;
		Datum		values[SLOT_COLUMNS];
		bool		nulls[SLOT_COLUMNS] = {false};
		int			c = 0;

		if (slot.state == SLOT_FREE || slot.state == SLOT_STARTING || slot.database != MyDatabaseId)
			continue;
		if (!monitor && !has_privs_of_role(GetUserId(), slot.owner))
			continue;
		values[c++] = Int32GetDatum(slot.pid);
		values[c++] = CStringGetTextDatum(slot.foreground ? "foreground" : "executor");
		values[c++] = ObjectIdGetDatum(slot.owner);
		nulls[c] = !running;
		values[c++] = Int32GetDatum(slot.handler_id);
		nulls[c] = !running;
		values[c++] = Int64GetDatum(slot.batch_id);
		nulls[c] = !running;
		values[c++] = Int64GetDatum(slot.chunk_id);
		values[c++] = CStringGetTextDatum(state_name(slot.state));
		values[c++] = Int64GetDatum(running ? slot.open_succeeded : 0);
		values[c++] = Int64GetDatum(running ? slot.open_failed : 0);
		nulls[c] = !running || slot.item_no == 0;
		values[c++] = Int64GetDatum(slot.item_no);
		nulls[c] = !running || slot.item_no == 0;
		values[c++] = TimestampTzGetDatum(slot.item_started_at);
		nulls[c] = !running;
		values[c++] = TimestampTzGetDatum(slot.claimed_at);
		nulls[c] = !running || slot.items_per_second <= 0;
		values[c++] = Float8GetDatum(slot.items_per_second);
		values[c++] = TimestampTzGetDatum(slot.started_at);
		tuplestore_putvalues(rsinfo->setResult, rsinfo->setDesc, values, nulls);
	}
	LWLockRelease(redrive_shared->lock);
	return (Datum) 0;
}
