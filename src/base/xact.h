/*-------------------------------------------------------------------------
 *
 * xact.h
 *	  Transactions of workers and of the foreground engine.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_XACT_H
#define REDRIVE_XACT_H

#include "fmgr.h"

extern void redrive_connect(void);
extern void redrive_disconnect(void);
extern void redrive_catalog_begin(void);
extern void redrive_catalog_end(void);
extern void redrive_worker_begin(void);
extern void redrive_worker_end(void);
extern void redrive_worker_end_durably(void);
extern void redrive_worker_abort(void);
extern void redrive_require_nonatomic(FunctionCallInfo fcinfo, const char *what);
extern void redrive_require_writable(FunctionCallInfo fcinfo);
extern void redrive_connect_nonatomic(void);
extern void redrive_reconnect(void);
extern void redrive_commit(void);
extern void redrive_commit_durably(void);
extern void redrive_make_durable(void);
extern void redrive_commit_lazily(void);
extern void redrive_rollback(void);

#endif							/* REDRIVE_XACT_H */
