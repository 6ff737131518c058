/*-------------------------------------------------------------------------
 *
 * executor.c
 *	  Processes that run chunks, connected as the handlers' owner.
 *
 * An executor belongs to one role in one database.  It exits when it has been
 * idle for a while, when another role needs its place, and after any error
 * that is not an item's: its chunk has been given back by then, or is found
 * orphaned by the supervisor.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "libpq/pqsignal.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "tcop/tcopprot.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/execute.h"
#include "flow/segment.h"
#include "proc/executor.h"

/* How often an idle one looks: nobody tells when what was locked, and so left out, is free. */
#define LOOK_MS 1000

/* Read the settings again; with fewer workers allowed, the last ones leave. */
static void
reload_settings(RedriveSlot *slot)
{
	int			before = 0;

	ConfigReloadPending = false;
	ProcessConfigFile(PGC_SIGHUP);
	LWLockAcquire(redrive_shared->lock, LW_SHARED);
	for (RedriveSlot *other = redrive_shared->slots; other < slot; other++)
		if (other->state != SLOT_FREE && !other->foreground)
			before++;
	LWLockRelease(redrive_shared->lock);
	if (before >= redrive_max_workers)
		slot->leave = true;
}

static bool
must_leave(RedriveSlot *slot)
{
	return redrive_stop_requested() || slot->leave || !redrive_enabled;
}

/*
 * What the owner's role or database sets for its sessions must not change how
 * we keep books.
 */
static void
fix_settings(void)
{
	SetConfigOption("default_transaction_isolation", "read committed", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("default_transaction_read_only", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("default_transaction_deferrable", "off", PGC_SUSET, PGC_S_OVERRIDE);
	SetConfigOption("role", "none", PGC_USERSET, PGC_S_OVERRIDE);
	SetConfigOption("application_name", "redrive executor", PGC_USERSET, PGC_S_SESSION);
}

/*
 * Run what is due.  Returns TURN_LOCKED if something is left that others have
 * locked, else whether something was due.
 */
static RedriveTurn
work_once(RedriveSlot *slot, MemoryContext cxt)
{
	RedriveTurn result = TURN_IDLE;

	redrive_worker_begin();
	pgstat_report_activity(STATE_RUNNING, "redrive: look for work");
	if (redrive_version_fits(DEBUG1))
	{
		for (;;)
		{
			RedriveTurn turn;

			/*
			 * Say that we are idle, then look: a commit before that is seen
			 * by the look, one after it finds an idle executor to wake.
			 */
			slot->state = SLOT_IDLE;
			pg_memory_barrier();
			if (must_leave(slot))
				break;
			turn = redrive_execute_next(slot, slot->owner, cxt, 0);
			if (turn != TURN_IDLE)
				result = turn;
			if (turn != TURN_WORKED)
				break;
			if (ConfigReloadPending)
				reload_settings(slot);
		}
	}
	else
		slot->leave = true;
	redrive_worker_end();
	return result;
}

/* Main function of an executor process; arg is its slot. */
void
redrive_executor_main(Datum arg)
{
	RedriveSlot *slot = &redrive_shared->slots[DatumGetInt32(arg)];
	uint32		generation;
	MemoryContext cxt;
	TimestampTz idle_since;
	uint32		wait_event;

	memcpy(&generation, MyBgworkerEntry->bgw_extra, sizeof(uint32));
	if (slot->generation != generation || slot->state != SLOT_STARTING)
		proc_exit(0);			/* given up by the supervisor */
	redrive_slot_attach(slot);

	redrive_take_signals(redrive_request_stop);
	BackgroundWorkerInitializeConnectionByOid(slot->database, slot->owner, REDRIVE_OWNER_CONNECTION_FLAGS);
	fix_settings();
	if (GetUserId() != slot->owner)
		elog(ERROR, "executor is not its owner's");
	redrive_init_timeouts(true);
	wait_event = redrive_wait_event("RedriveExecutorIdle");
	cxt = AllocSetContextCreate(TopMemoryContext, "redrive executor", ALLOCSET_DEFAULT_SIZES);
	idle_since = GetCurrentTimestamp();

	while (!must_leave(slot))
	{
		RedriveTurn turn;

		CHECK_FOR_INTERRUPTS();
		if (ConfigReloadPending)
			reload_settings(slot);
		turn = work_once(slot, cxt);
		if (turn != TURN_IDLE)
			idle_since = GetCurrentTimestamp();
		if (TimestampDifferenceExceeds(idle_since, GetCurrentTimestamp(), redrive_worker_idle_timeout))
			break;
		if (slot->state != SLOT_IDLE)
			continue;			/* woken while we looked */
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 turn == TURN_LOCKED ? LOCKED_NAP_MS : Max(Min(redrive_worker_idle_timeout, LOOK_MS), 1), wait_event);
		ResetLatch(MyLatch);
	}
	slot->clean_exit = true;
	proc_exit(0);
}
