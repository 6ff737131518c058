/*-------------------------------------------------------------------------
 *
 * xact.c
 *	  Transactions of workers and of the foreground engine.
 *
 * The engine always runs in a non-atomic SPI connection, so that a worker and
 * CALL redrive.work() commit in the same way.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "executor/spi.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "pgstat.h"
#include "utils/guc.h"
#include "utils/lsyscache.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"

#include "base/xact.h"

/* Connect to SPI for the length of one SQL function call. */
void
redrive_connect(void)
{
	if (SPI_connect() != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
}

/* End redrive_connect or redrive_connect_nonatomic. */
void
redrive_disconnect(void)
{
	if (SPI_finish() != SPI_OK_FINISH)
		elog(ERROR, "SPI_finish failed");
}

/* Connect to SPI such that redrive_commit can be called. */
void
redrive_connect_nonatomic(void)
{
	if (SPI_connect_ext(SPI_OPT_NONATOMIC) != SPI_OK_CONNECT)
		elog(ERROR, "SPI_connect failed");
}

/*
 * End the connection and make a new one: frees the rows of all statements,
 * which would otherwise pile up as long as a worker is busy.
 *
 * The caller's memory context must not be one of the connection.
 */
void
redrive_reconnect(void)
{
	MemoryContext old_cxt = CurrentMemoryContext;

	redrive_disconnect();
	redrive_connect_nonatomic();
	MemoryContextSwitchTo(old_cxt);
}

/* Refuse to run a procedure that commits inside a transaction block. */
void
redrive_require_nonatomic(FunctionCallInfo fcinfo, const char *what)
{
	if (fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("%s cannot be called in a transaction block", what),
				 errdetail("It commits as it goes."),
				 errhint("CALL it at top level, outside BEGIN and outside functions.")));
}

/*
 * Refuse to run an SQL function of ours that writes where nothing can be
 * written, before PostgreSQL does so in words about our tables.
 */
void
redrive_require_writable(FunctionCallInfo fcinfo)
{
	if (!XactReadOnly)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
			 errmsg("redrive.%s() cannot be called in a read-only transaction", get_func_name(fcinfo->flinfo->fn_oid)),
			 RecoveryInProgress() ? errdetail("This server is a standby.") : 0,
			 RecoveryInProgress() ? errhint("Connect to the primary.") :
			 errhint("BEGIN READ WRITE, or look whether default_transaction_read_only is on.")));
}

/* Begin a transaction that only reads catalogs, without SPI. */
void
redrive_catalog_begin(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();
	(void) GetTransactionSnapshot();
}

/* End it. */
void
redrive_catalog_end(void)
{
	CommitTransactionCommand();
}

/* Let the commit of this transaction wait for the disk, whatever synchronous_commit is. */
static void
wait_for_disk(void)
{
	if (synchronous_commit == SYNCHRONOUS_COMMIT_OFF)
		(void) set_config_option("synchronous_commit", "local", PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
}

/* Begin a transaction of a worker, connected to SPI. */
void
redrive_worker_begin(void)
{
	SetCurrentStatementStartTimestamp();
	StartTransactionCommand();

	/*
	 * below it SPI puts what an error leaves; a worker has no portal that
	 * would free it
	 */
	if (PortalContext == NULL)
		PortalContext = AllocSetContextCreate(TopMemoryContext, "redrive statements", ALLOCSET_DEFAULT_SIZES);
	/* SPI comes back to this context, which must outlive the transaction */
	MemoryContextSwitchTo(TopMemoryContext);
	redrive_connect_nonatomic();
}

/* Commit and end what redrive_worker_begin began; the worker may wait now. */
void
redrive_worker_end(void)
{
	redrive_disconnect();
	CommitTransactionCommand();
	pgstat_report_stat(true);
	pgstat_report_activity(STATE_IDLE, NULL);
}

/* The same for what must be known after a crash. */
void
redrive_worker_end_durably(void)
{
	wait_for_disk();
	redrive_worker_end();
}

/*
 * Commit and go on in a new transaction.
 *
 * On an error in the commit the transaction is rolled back, a new one is open,
 * and the error is thrown on: the caller may catch it and go on.
 */
void
redrive_commit(void)
{
	SetCurrentStatementStartTimestamp();
	SPI_commit();
	pgstat_report_stat(false);
}

/*
 * Commit and wait for the disk, whatever synchronous_commit is: for what must be
 * known after a crash.
 */
void
redrive_commit_durably(void)
{
	wait_for_disk();
	redrive_commit();
}

/*
 * Make sure that what this transaction has seen of others outlives a crash.
 *
 * It must have written something after it saw that: up to there the WAL is
 * flushed.  (Not up to the insert position, which at the end of a page lies
 * behind the header of the next one: to flush that far is an error.)
 */
void
redrive_make_durable(void)
{
	Assert(!XLogRecPtrIsInvalid(XactLastRecEnd));
	XLogFlush(XactLastRecEnd);
}

/*
 * Commit without waiting for the disk: for what is done again if a crash
 * swallows it.
 */
void
redrive_commit_lazily(void)
{
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	redrive_commit();
}

/*
 * Roll back after a caught error and go on in a new transaction.
 *
 * The error may have come from within functions that our statements call:
 * their subtransactions, SPI connections and snapshots are still there, and
 * SPI_rollback wants to find just our own connection.
 */
void
redrive_rollback(void)
{
	MemoryContext old_cxt = CurrentMemoryContext;

	while (GetCurrentTransactionNestLevel() > 1)
		RollbackAndReleaseCurrentSubTransaction();
	while (!SPI_inside_nonatomic_context())
		redrive_disconnect();
	while (ActiveSnapshotSet())
		PopActiveSnapshot();
	MemoryContextSwitchTo(old_cxt);
	SPI_rollback();
}

/* End the transaction of a worker after a caught error; it may begin another. */
void
redrive_worker_abort(void)
{
	AbortOutOfAnyTransaction();
	MemoryContextSwitchTo(TopMemoryContext);
	if (PortalContext != NULL)
		MemoryContextReset(PortalContext);
	pgstat_report_stat(false);
	pgstat_report_activity(STATE_IDLE, NULL);
}
